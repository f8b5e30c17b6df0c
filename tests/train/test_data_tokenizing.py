from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from trl.trainer.dpo_trainer import DPOTrainer

from train.data import DataError, Record, tokenize_preference, tokenize_sft

LIMITS: Any = {"max_prompt_length": 200, "max_completion_length": 200}


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


STRINGS = [
    {"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Rome, that is it."},
    # The end of the prompt merges with the start of the answer: " " + "Paris" is one token.
    {"prompt": "The capital of France is ", "chosen": "Paris.", "rejected": "Rome."},
    {"prompt": "Name a colour.\n", "chosen": "Blue\n", "rejected": "Grün 🙂"},
]
CONVERSATIONS = [
    {"prompt": [user("What is two plus three?")], "chosen": [bot("five")], "rejected": [bot("6")]},
    {
        "prompt": [{"role": "system", "content": "Be kind."}, user("a"), bot("b"), user("c")],
        "chosen": [bot("d\n")],
        "rejected": [bot("e")],
    },
]


def rows_of(dataset, name):
    """The real tokens of every row of a column."""
    tokens, mask = dataset.arrays[f"{name}_tokens"], dataset.arrays[f"{name}_mask"]
    return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]


def trl_rows(tokenizer, records):
    """What `DPOTrainer` makes of the same records."""
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    settings: Any = SimpleNamespace(dataset_num_proc=None, max_length=None)
    return DPOTrainer._prepare_dataset(
        trainer, Dataset.from_list(records), tokenizer, settings, "train"
    )


@pytest.mark.parametrize("name", ["plain_tokenizer", "bos_tokenizer"])
def test_strings_are_tokenised_as_by_trl(name, request):
    tokenizer = request.getfixturevalue(name)
    dataset = tokenize_preference(STRINGS, tokenizer, **LIMITS)
    expected = trl_rows(tokenizer, STRINGS)
    assert rows_of(dataset, "prompt") == expected["prompt_ids"]
    assert rows_of(dataset, "chosen") == expected["chosen_ids"]
    assert rows_of(dataset, "rejected") == expected["rejected_ids"]
    assert dataset.report.boundaries_moved == 1
    assert all((row[0] == tokenizer.bos_token_id) for row in rows_of(dataset, "prompt")) == (
        name == "bos_tokenizer"
    )


def test_conversations_are_tokenised_as_by_trl_up_to_the_end_token(chat_tokenizer):
    dataset = tokenize_preference(CONVERSATIONS, chat_tokenizer, **LIMITS)
    expected = trl_rows(chat_tokenizer, CONVERSATIONS)
    newline = chat_tokenizer("\n").input_ids
    assert rows_of(dataset, "prompt") == expected["prompt_ids"]
    for name in ("chosen", "rejected"):
        rows = rows_of(dataset, name)
        # TRL also trains on the newline that the template writes behind the end of the turn.
        assert [row + newline for row in rows] == expected[f"{name}_ids"]
        assert all(row.count(chat_tokenizer.eos_token_id) == 1 for row in rows)
        assert all(row[-1] == chat_tokenizer.eos_token_id for row in rows)
    text = chat_tokenizer.decode(rows_of(dataset, "chosen")[1])
    assert text == "d\n<|im_end|>"


def test_eos_comes_once_when_the_text_has_it(plain_tokenizer):
    records = [{"prompt": "a", "completion": " b</s>"}, {"prompt": "a", "completion": " b</s> \n"}]
    records.append({"prompt": "a", "completion": " b"})
    rows = rows_of(tokenize_sft(records, plain_tokenizer, **LIMITS), "completion")
    assert rows[0] == rows[1] == rows[2]
    assert rows[0][-1] == plain_tokenizer.eos_token_id
    assert rows[0].count(plain_tokenizer.eos_token_id) == 1


def test_bos_comes_once_when_the_text_has_it(bos_tokenizer):
    records = [{"prompt": "<s>a", "completion": " b"}, {"prompt": "a", "completion": " b"}]
    rows = rows_of(tokenize_sft(records, bos_tokenizer, **LIMITS), "prompt")
    assert rows[0] == rows[1]
    assert rows[0].count(bos_tokenizer.bos_token_id) == 1


def test_a_template_may_close_turns_with_another_token_than_eos(chat_tokenizer):
    chat_tokenizer.eos_token = "</s>"
    closing = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = rows_of(tokenize_preference(CONVERSATIONS, chat_tokenizer, **LIMITS), "chosen")
    assert all(row[-1] == closing and chat_tokenizer.eos_token_id not in row for row in rows)


def test_a_template_that_closes_turns_with_nothing_gets_eos(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
    )
    row = rows_of(tokenize_preference(CONVERSATIONS, chat_tokenizer, **LIMITS), "chosen")[0]
    assert chat_tokenizer.decode(row) == "five\n<|im_end|>"


def test_a_template_that_renders_the_prompt_alone_differently(chat_tokenizer):
    """Gemma 4 ends a lone prompt with an empty thought that whole conversations leave out."""
    template = chat_tokenizer.chat_template
    chat_tokenizer.chat_template = template.replace(
        "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<s></s>' }}{% endif %}"
    )
    dataset = tokenize_preference(CONVERSATIONS, chat_tokenizer, **LIMITS)
    assert dataset.report.boundaries_moved == 2
    assert rows_of(dataset, "prompt") == trl_rows(chat_tokenizer, CONVERSATIONS)["prompt_ids"]
    assert chat_tokenizer.decode(rows_of(dataset, "chosen")[0]) == "five<|im_end|>"


# The first is Llama 3.2's; the second asks the clock whatever it is given, as SmolLM3's does.
LLAMA_DATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{- date_string + '\n' }}"
)
CLOCK_DATE = "{{- strftime_now('%-d %B %Y, %Y-%m-%d, %F') + '\n' }}"


@pytest.mark.parametrize(
    ("date", "expected"),
    [(LLAMA_DATE, "26 Jul 2024\n"), (CLOCK_DATE, "26 July 2024, 2024-07-26, 2024-07-26\n")],
)
def test_a_template_with_a_date_makes_the_same_tokens_every_day(chat_tokenizer, date, expected):
    chat_tokenizer.chat_template = date + chat_tokenizer.chat_template
    dataset = tokenize_preference(CONVERSATIONS, chat_tokenizer, **LIMITS)
    prompts = [chat_tokenizer.decode(row) for row in rows_of(dataset, "prompt")]
    assert all(prompt.startswith(f"{expected}<|im_start|>") for prompt in prompts)
    assert dataset.report.boundaries_moved == 0
    messages = CONVERSATIONS[0]["prompt"]
    today = chat_tokenizer.apply_chat_template(messages, tokenize=False)
    assert not today.startswith(expected)  # so the template does have a clock


def test_instructions_and_wrapped_strings_are_user_turns(chat_tokenizer):
    wrapped = tokenize_sft(
        [{"prompt": "Add.\n\n1 1", "completion": "2"}], chat_tokenizer, template="chat", **LIMITS
    )
    record = {"instruction": "Add.", "input": "1 1", "output": "2"}
    alpaca = tokenize_sft([record], chat_tokenizer, **LIMITS)
    assert wrapped.fingerprint() == alpaca.fingerprint()
    assert chat_tokenizer.decode(rows_of(alpaca, "prompt")[0]) == (
        "<|im_start|>user\nAdd.\n\n1 1<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = tokenize_sft([{"prompt": "Add.\n\n1 1", "completion": "2"}], chat_tokenizer, **LIMITS)
    assert chat_tokenizer.decode(rows_of(plain, "prompt")[0]) == "Add.\n\n1 1"


def test_prompts_end_and_completions_start_at_the_same_column(plain_tokenizer):
    dataset = tokenize_preference(STRINGS, plain_tokenizer, **LIMITS)
    assert len(dataset) == 3
    for name, mask in dataset.arrays.items():
        if name.endswith("_mask"):
            assert mask.dtype == bool
            assert mask.shape[1] % 8 == 0
            steps = np.diff(mask.astype(int), axis=1)
            assert (steps >= 0).all() if name == "prompt_mask" else (steps <= 0).all()
            assert (dataset.arrays[name.replace("mask", "tokens")][~mask] == 2).all()
    widths = [dataset.arrays[f"{name}_mask"].shape[1] for name in ("prompt", "chosen", "rejected")]
    longest = dataset.report.prompts.largest, dataset.report.completions.largest
    assert widths == [-(-longest[0] // 8) * 8, *[-(-longest[1] // 8) * 8] * 2]
    assert dataset.arrays["prompt_tokens"].dtype == dataset.arrays["index"].dtype == np.int32
    np.testing.assert_array_equal(dataset.arrays["index"], [0, 1, 2])


def test_truncation_keeps_the_completion(bos_tokenizer):
    long, short = "one two three four five six seven", "one"
    records = [
        {"prompt": long, "chosen": " a", "rejected": " " + long},
        {"prompt": short, "chosen": " b", "rejected": " c"},
    ]
    whole = tokenize_preference(records, bos_tokenizer, **LIMITS)
    cut = tokenize_preference(
        records, bos_tokenizer, max_prompt_length=10, max_completion_length=11
    )
    prompts, cut_prompts = rows_of(whole, "prompt"), rows_of(cut, "prompt")
    assert cut_prompts[0] == [bos_tokenizer.bos_token_id, *prompts[0][-9:]]
    assert cut_prompts[1] == prompts[1]
    assert rows_of(cut, "chosen") == rows_of(whole, "chosen")
    assert rows_of(cut, "rejected")[0] == rows_of(whole, "rejected")[0][:11]
    assert cut.arrays["prompt_tokens"].shape == (2, 10)
    assert cut.arrays["chosen_tokens"].shape == (2, 11)
    report = cut.report
    assert (report.prompts_truncated, report.completions_truncated) == (1, 1)
    assert "1 prompts truncated\n" in str(report)
    assert whole.report.prompts_truncated == whole.report.completions_truncated == 0


def test_truncation_may_keep_the_start_of_the_prompt(bos_tokenizer):
    records = [{"prompt": "one two three four five six", "completion": " a b c"}]
    whole = tokenize_sft(records, bos_tokenizer, **LIMITS)
    limits: Any = {"max_prompt_length": 8, "max_completion_length": 200}
    cut = tokenize_sft(records, bos_tokenizer, truncation="keep_start", **limits)
    assert rows_of(cut, "prompt")[0] == rows_of(whole, "prompt")[0][:8]
    assert rows_of(cut, "completion") == rows_of(whole, "completion")
    with pytest.raises(DataError, match="truncation must be keep_end or keep_start, got 'middle'"):
        tokenize_sft(records, bos_tokenizer, truncation="middle", **LIMITS)


def test_every_record_is_accounted_for(chat_tokenizer):
    long = "a b c d e f g h i j k l m n"
    records = [
        *CONVERSATIONS,
        {"prompt": "a", "chosen": " same", "rejected": " same"},
        {"prompt": "a", "chosen": " b<|im_end|> c", "rejected": " d"},
        {"prompt": "a", "chosen": " b", "rejected": " <|im_start|> d"},
        {"prompt": "a", "chosen": f" {long} x", "rejected": f" {long} y"},
        {"prompt": "wx", "chosen": "wxyz", "rejected": "wx"},
    ]
    dataset = tokenize_preference(
        records, chat_tokenizer, max_prompt_length=200, max_completion_length=12
    )
    assert dataset.report.dropped == {
        "chosen and rejected are the same": 1,
        "the completion contains the end token": 1,
        "the completion contains the BOS token": 1,
        "chosen and rejected are the same tokens within the limit": 1,
    }
    assert dataset.report.records == 7
    assert dataset.report.rows == len(dataset) == 3
    assert "dropped 1: the completion contains the BOS token" in str(dataset.report)


def test_report_counts_tokens(plain_tokenizer):
    dataset = tokenize_preference(STRINGS, plain_tokenizer, **LIMITS)
    prompts = [len(row) for row in rows_of(dataset, "prompt")]
    answers = [len(row) for name in ("chosen", "rejected") for row in rows_of(dataset, name)]
    report = dataset.report
    assert (report.prompts.mean, report.prompts.largest) == (np.mean(prompts), max(prompts))
    assert report.completions.mean == pytest.approx(np.mean(answers))


def test_malformed_records_are_listed_together(plain_tokenizer):
    good = {"prompt": "a", "completion": "b"}
    bad = [Record({"prompt": "a", "completion": ""}, f"x.jsonl line {n}") for n in range(1, 9)]
    with pytest.raises(DataError) as error:
        tokenize_sft([good, *bad], plain_tokenizer, **LIMITS)
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("x.jsonl line 1: field 'completion' is empty")
    assert lines[-1] == "... and 3 more."


def test_what_cannot_be_tokenised_is_explained(plain_tokenizer, chat_tokenizer):
    with pytest.raises(DataError, match="is a conversation, but the tokenizer has no chat templat"):
        tokenize_preference(CONVERSATIONS, plain_tokenizer, **LIMITS)
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(DataError, match=r"None of 2 records can be used \(2: chosen and rejected"):
        tokenize_preference([same, same], plain_tokenizer, **LIMITS)
    with pytest.raises(DataError, match="max_completion_length must be at least 1, got 0"):
        tokenize_preference(STRINGS, plain_tokenizer, max_prompt_length=5, max_completion_length=0)
    with pytest.raises(DataError, match="template must be 'auto' or 'chat', got 'alpaca'"):
        tokenize_preference(STRINGS, plain_tokenizer, template="alpaca", **LIMITS)  # type: ignore
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    record = Record(CONVERSATIONS[0], "x.jsonl line 4")
    with pytest.raises(DataError, match=r"x\.jsonl line 4: the chat template refuses.*alternate"):
        tokenize_preference([record], chat_tokenizer, **LIMITS)
    plain_tokenizer.eos_token = None
    with pytest.raises(DataError, match="The tokenizer has no EOS token"):
        tokenize_preference(STRINGS, plain_tokenizer, **LIMITS)
