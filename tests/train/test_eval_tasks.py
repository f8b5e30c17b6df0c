"""Perplexity, given choices and generated answers, next to transformers on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.tiny_runs import flags, make_model_dir, make_tokenizer, write_jsonl
from train.cli import main
from train.config import ChoiceTaskOptions, ExactMatchOptions, PerplexityOptions, UserError
from train.continuations import windows
from train.exact_match import measure_exact_match, read_problems
from train.given_choices import read_choice_questions
from train.greedy_text import cut_at
from train.perplexity import read_texts

TEXTS = [
    "The tax is small.",
    "Merging keeps what the model knew before it was aligned; it does.",
    "!",
]
QUESTIONS = [
    {"question": "2+2?", "choices": ["3", "four", "22"], "answer": 1},
    {"question": "3+3?", "choices": ["six", "7"], "answer": "A"},
    {"question": "1+0?", "choices": ["one hundred", "1", "0", "ten"], "answer": "1"},
    {"question": "Sky?", "choices": ["blue", "green"], "answer": "B"},
    {"question": "Sum?", "choices": ["a", "bb", "ccc"], "answer": 2},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"), 3)


@pytest.fixture(scope="module")
def theirs(directory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def evaluate(directory: Path, out: Path, **values) -> dict:
    settings = {"model": directory, "output": out, "batch_size": 4}
    settings |= {name.replace("__", "."): value for name, value in values.items()}
    assert main(["eval", *flags(settings)]) == 0
    return json.loads(out.read_text())["tasks"]


def logps(model, tokens: list[int]) -> np.ndarray:
    """Log-probability of every token but the first, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()


def guide_loss(model, tokens: list[int], length: int, stride: int) -> tuple[float, int]:
    """Sum of −log p by the loop of transformers' guide to perplexity, and how many tokens."""
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens))
        inputs = torch.tensor([tokens[begin:end]])
        targets = inputs.clone()
        targets[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=targets).loss
        scored = int((targets[:, 1:] != -100).sum())
        total, count, previous = total + float(loss) * scored, count + scored, end
        if end == len(tokens):
            break
    return total, count


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_perplexity_is_that_of_the_guide(directory, theirs, tmp_path, separator):
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    given = {"path": str(file), "max_length": 24, "stride": 7, "separator": separator}
    found = evaluate(directory, tmp_path / "out.json", perplexity=json.dumps({"t": given}))["t"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    joined = TEXTS if separator is None else [separator.join(TEXTS)]
    sums = [
        guide_loss(theirs, ids, 24, 7)
        for ids in tokenizer(joined)["input_ids"]
        if len(ids) > 1  # "!" alone has nothing before it
    ]
    loss = sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert found["tokens"] == sum(count for _, count in sums)
    assert found["texts"] == len(sums) == (2 if separator is None else 1)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_text_file_in_one_window(directory, theirs, tmp_path):
    (tmp_path / "book.txt").write_text(TEXTS[1])
    given = {"perplexity__book__path": tmp_path / "book.txt"}
    found = evaluate(directory, tmp_path / "out.json", **given)["book"]
    ids = AutoTokenizer.from_pretrained(directory)(TEXTS[1])["input_ids"]
    assert found["loss"] == pytest.approx(-logps(theirs, ids).mean(), rel=1e-5)


@pytest.mark.parametrize(("length", "stride"), [(4, 1), (5, 4), (8, 3), (40, 20)])
def test_windows_score_every_token_once(length, stride):
    cut = list(windows(list(range(23)), length, stride))
    assert [token for window in cut for token in window.tokens] == list(range(1, 23))
    for window in cut:
        together = [*window.context, *window.tokens]
        assert together == list(range(together[0], together[0] + len(together)))
        assert len(window.context) >= 1
        assert len(together) <= length
    for window in cut[1:]:
        assert len(window.context) >= length - stride


def test_choices_are_scored_as_one_by_one(directory, theirs, tmp_path):
    file = write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    given = {"path": str(file), "prompt": "Q: {question}\nA:"}
    found = evaluate(directory, tmp_path / "out.json", choices=json.dumps({"q": given}))["q"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    hits, normed, right = [], [], []
    for record, answer in zip(QUESTIONS, [1, 0, 1, 1, 2], strict=True):
        prompt = tokenizer(f"Q: {record['question']}\nA:")["input_ids"]
        sums = []
        for choice in record["choices"]:
            continuation = tokenizer(f" {choice}")["input_ids"]
            sums.append(logps(theirs, prompt + continuation)[-len(continuation) :].sum())
        hits.append(int(np.argmax(sums)) == answer)
        lengths = [len(choice) for choice in record["choices"]]
        normed.append(int(np.argmax(np.array(sums) / lengths)) == answer)
        right.append(sums[answer])
    assert 0 < np.mean(hits) < 1
    assert np.mean(hits) != np.mean(normed)
    assert found["acc"] == pytest.approx(np.mean(hits))
    assert found["acc_norm"] == pytest.approx(np.mean(normed))
    assert found["acc_stderr"] == pytest.approx(np.std(hits, ddof=1) / 5**0.5)
    assert found["logp"] == pytest.approx(np.mean(right), rel=1e-5)


def test_letters_and_labels(tmp_path):
    labelled = {"label": ["1", "2"], "text": ["x", "y"]}
    rows = [{"q": "?", "choices": labelled, "answer": "2"}]
    file = write_jsonl(tmp_path / "arc.jsonl", rows)
    options = ChoiceTaskOptions(path=str(file), prompt="{q}\n{options}\nAnswer:", score="letter")
    tokenizer = make_tokenizer()
    (question,), unusable = read_choice_questions("choices.arc", options, tokenizer, 256)
    assert (question.right, unusable) == (1, 0)
    assert tokenizer.decode(question.prompt) == "?\n1. x\n2. y\nAnswer:"
    assert [tokenizer.decode(answer) for answer in question.answers] == [" 1", " 2"]
    assert question.lengths == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "choices.q.answer: q.jsonl line 1 has answer = 3, which is no number"),
        ({"answer": True}, "choices.q.answer: "),
        ({"answer": "E"}, "none of A, B, C"),
        ({"choices": ["one"]}, "choices.q.choices: q.jsonl line 1 needs two texts or more"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "has 2 texts and the labels ['A']"),
    ],
)
def test_bad_choices(tmp_path, change, message):
    file = write_jsonl(tmp_path / "q.jsonl", [{**QUESTIONS[0], **change}])
    options = ChoiceTaskOptions(path=str(file), prompt="{question}")
    with pytest.raises(UserError) as caught:
        read_choice_questions("choices.q", options, make_tokenizer(), 256)
    assert message in str(caught.value)


def test_exact_match_generates_what_transformers_does(directory, theirs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = ["1+1=", "The sky is", "Merging", "x"]
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        ends = {"eos_token_id": [1, 2], "pad_token_id": 1}  # the tokenizer's and the model's
        out = theirs.generate(ids, max_new_tokens=9, do_sample=False, **ends)
        new = [token for token in out[0, ids.shape[1] :].tolist() if token not in (1, 2)]
        texts.append(tokenizer.decode(new))
    # Two right answers, one wrong, one that differs in case alone.
    wanted = [texts[0], texts[1].swapcase(), texts[2] + "?", texts[3]]
    records = [{"p": p, "a": f"work #### {w}"} for p, w in zip(prompts, wanted, strict=True)]
    file = write_jsonl(tmp_path / "m.jsonl", records)
    given = {"path": str(file), "prompt": "{p}", "answer": "{a}", "answer_pattern": "(?s)#### (.*)"}
    given |= {"pattern": "(?s).+", "max_new_tokens": 9, "chat_template": False, "ignore": []}
    found = evaluate(directory, tmp_path / "out.json", exact_match=json.dumps({"m": given}))["m"]
    assert found == {"exact_match": 0.75, "answered": 1.0, "problems": 4}


def test_last_number_is_the_answer(tmp_path):
    """GSM8K's answers, as its own format writes them."""
    records = [{"question": "?", "answer": f"so <<1+1=2>> #### {n}"} for n in ("1,234", "5", "7")]
    options = ExactMatchOptions(
        path=str(write_jsonl(tmp_path / "gsm.jsonl", records)),
        prompt="{question}",
        answer="{answer}",
        answer_pattern="#### (.+)",
        stop=["Q:"],
    )
    problems, _ = read_problems("exact_match.gsm", options, make_tokenizer(), 300)
    assert [problem.answer for problem in problems] == ["1234", "5", "7"]
    written = ["First 3, then $1234.", "it is 5.Q: 6", "no idea"]

    def write(params, prompts, stop, shown_as):
        return [cut_at(text, stop) for text in written]

    found = measure_exact_match(write, None, problems, options, shown_as="gsm")
    assert found == {"exact_match": 2 / 3, "answered": 2 / 3, "problems": 3}


MISTAKES = [
    ({"answer_pattern": "@@(.+)"}, "exact_match.m.answer_pattern: '@@(.+)' finds no answer in"),
    ({"pattern": "("}, "exact_match.m.pattern: '(' is no regular expression"),
    ({"max_new_tokens": 300}, "exact_match.m.max_new_tokens must be in [1, 255], got 300"),
    ({"prompt": "{nothing}"}, "exact_match.m.prompt: '{nothing}' cannot be filled"),
    ({"max_new_tokens": 255}, "no prompt is short enough for 255 new tokens"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_bad_exact_match(tmp_path, change, message):
    file = write_jsonl(tmp_path / "m.jsonl", [{"p": "1+1", "a": "2"}])
    given = {"path": str(file), "prompt": "{p}", "answer": "{a}", "max_new_tokens": 9, **change}
    with pytest.raises(UserError) as caught:
        read_problems("exact_match.m", ExactMatchOptions(**given), make_tokenizer(), 256)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 999}, "perplexity.t.max_length must be in [2, 256], got 999"),
        ({"max_length": 8, "stride": 8}, "perplexity.t.stride must be in [1, 7], got 8"),
        ({"field": "body"}, "perplexity.t.field: t.jsonl line 1 has no text 'body'"),
        ({"path": "nowhere.txt"}, "perplexity.t.path: "),
    ],
)
def test_bad_perplexity(tmp_path, change, message):
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": "x"}])
    options = PerplexityOptions(**{"path": str(file), **change})
    with pytest.raises(UserError) as caught:
        read_texts("perplexity.t", options, make_tokenizer(), 256)
    assert message in str(caught.value)


def test_one_name_for_two_tasks(directory, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    values = {"model": directory, "output": tmp_path / "o.json", "perplexity.t.path": "a.txt"}
    values["choices"] = json.dumps({"t": {"path": "q.jsonl", "prompt": "{q}"}})
    assert main(["eval", *flags(values)]) == 2
    assert "'t' names a task in more than one of" in capsys.readouterr().err
