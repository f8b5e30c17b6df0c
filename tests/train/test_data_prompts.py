"""Prompts alone: read from every format, tokenised as TRL does, split, mixed and batched."""

from __future__ import annotations

import pytest
from trl.data_utils import apply_chat_template

from train.data import (
    DataError,
    make_buckets,
    make_loader,
    mix,
    normalise_prompt,
    split_by_prompt,
    tokenize_prompts,
)

LIMITS = {"max_prompt_length": 40, "max_completion_length": 8}


def turn(text, role="user"):
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "1+1="}, "1+1="),
        ({"prompt": [turn("Hi")], "answer": "4"}, [turn("Hi")]),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "Hi"),
        ({"chosen": "So it is", "rejected": "So it was"}, "So it"),
        ({"instruction": "Add", "input": "1 1"}, [turn("Add\n\n1 1")]),
        ({"question": "Why?"}, [turn("Why?")]),
        ({"messages": [turn("Hi"), turn("Yo", "assistant")]}, [turn("Hi")]),
    ],
)
def test_every_format_has_its_prompt(record, prompt):
    assert normalise_prompt(record) == prompt


@pytest.mark.parametrize("record", [{"answer": "4"}, {"prompt": ""}, {"prompt": 3}, {"prompt": []}])
def test_records_without_a_prompt_are_refused(record, plain_tokenizer):
    with pytest.raises(DataError, match=r"record: f(ound|ield)"):
        tokenize_prompts([record], plain_tokenizer, **LIMITS)


def test_tokens_are_those_of_trl(chat_tokenizer, plain_tokenizer):
    conversations = [{"prompt": [turn("Name a colour.")]}, {"prompt": [turn("Why?")]}]
    found = tokenize_prompts(conversations, chat_tokenizer, **LIMITS)
    for row, record in enumerate(conversations):
        text = apply_chat_template(record, chat_tokenizer)["prompt"]
        expected = chat_tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = found.arrays["prompt_tokens"][row][found.arrays["prompt_mask"][row]]
        assert tokens.tolist() == expected
    text = "What is two plus three?"
    found = tokenize_prompts([{"prompt": text, "answer": "5"}], plain_tokenizer, **LIMITS)
    tokens = found.arrays["prompt_tokens"][0][found.arrays["prompt_mask"][0]]
    assert tokens.tolist() == plain_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.arrays["record"][0] == {"prompt": text, "answer": "5"}


def test_prompts_are_split_by_their_text():
    records = [{"prompt": f"{number % 10}+1=", "gold": number} for number in range(40)]
    train, held_out = split_by_prompt(records, 0.3)
    sides = [{record["prompt"] for record in side} for side in (train, held_out)]
    assert len(train) + len(held_out) == 40
    assert not sides[0] & sides[1]
    # An SFT record with the same prompt falls on the same side.
    pairs = [{**record, "completion": "2"} for record in records]
    assert {one["prompt"] for one in split_by_prompt(pairs, 0.3)[1]} == sides[1]


def test_batches_bring_their_records_along(plain_tokenizer):
    records = [{"prompt": "word " * (1 + number % 7), "number": number} for number in range(32)]
    data = tokenize_prompts(records, plain_tokenizer, **LIMITS)
    data = mix([data, data], [1, 0.5])
    buckets = make_buckets(data, 4, 4)
    assert "padding" in buckets.describe(data.arrays)
    assert 0 <= buckets.padding_share(data.arrays) < 1
    loader = make_loader(data, 4, buckets=buckets)
    for _ in range(8):
        batch = next(loader)
        rows = zip(batch["prompt_tokens"], batch["prompt_mask"], batch["record"], strict=True)
        for tokens, mask, record in rows:
            text = plain_tokenizer.decode(tokens[mask])
            assert text == record["prompt"]
    state = loader.get_state()
    expected = next(loader)["record"].tolist()
    loader.set_state(state)
    assert next(loader)["record"].tolist() == expected
