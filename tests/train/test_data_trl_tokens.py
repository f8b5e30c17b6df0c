"""Real rows in the chat templates of SmolLM2 and Qwen: the tokens and masks of TRL."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from datasets import Dataset
from trl import DPOTrainer, KTOTrainer

from train.data import read_records, tokenize_preference, tokenize_sft
from train.data.records import normalise_preference, normalise_sft

DATA = Path(__file__).parents[1] / "data" / "tokens"
LIMITS: Any = {"max_prompt_length": 2000, "max_completion_length": 2000}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Réponds brièvement."},
    {"role": "user", "content": "Ça va ?"},
    {"role": "assistant", "content": "Oui 🙂\n"},
    {"role": "user", "content": "  Et toi?\n\n"},
]
MORE = [
    {"prompt": TURNS, "chosen": "Bien, merci.", "rejected": "Non."},
    {"prompt": TURNS[1:], "chosen": "\nBien\n", "rejected": " Non "},
    {"prompt": TURNS[1:2], "chosen": "1\n2", "rejected": "<b>1</b>"},
]


@pytest.fixture(params=["SmolLM2", "qwen2_5", "qwen3"])
def tokenizer(request, chat_tokenizer):
    template = SMOLLM2
    if request.param != "SmolLM2":
        file = Path(trl.__file__).parent / "chat_templates" / f"{request.param}.jinja"
        template = file.read_text()
    chat_tokenizer.chat_template = template
    return chat_tokenizer


def trl_rows(trainer_class, tokenizer, rows):
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, **weights)
    settings: Any = SimpleNamespace(dataset_num_proc=None, max_length=None)
    data = Dataset.from_list(rows)
    return trainer_class._prepare_dataset(trainer, data, tokenizer, settings, "train")


def check(data, names, expected, tokenizer):
    newline = tokenizer("\n").input_ids
    assert len(data) == len(expected)
    for name in names:
        tokens, mask = data.arrays[f"{name}_tokens"], data.arrays[f"{name}_mask"]
        rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
        if name != "prompt":
            # TRL trains on what the template writes behind the end of the turn; nothing generates it.
            rows = [row + newline for row in rows]
            assert all(row.count(tokenizer.eos_token_id) == 1 for row in rows)
        assert rows == expected[f"{name}_ids"]


def test_preferences(tokenizer):
    records = [*read_records(DATA / "preferences.jsonl"), *MORE]
    pairs = [normalise_preference(record) for record in records]
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    expected = trl_rows(DPOTrainer, tokenizer, rows)
    data = tokenize_preference(records, tokenizer, **LIMITS)
    check(data, ("prompt", "chosen", "rejected"), expected, tokenizer)


def test_unpaired(tokenizer):
    records = read_records(DATA / "unpaired.jsonl")
    examples = [normalise_sft(record) for record in records]
    rows = [
        {"prompt": e.prompt, "completion": e.completion, "label": record["label"]}
        for e, record in zip(examples, records, strict=True)
    ]
    expected = trl_rows(KTOTrainer, tokenizer, rows)
    check(tokenize_sft(records, tokenizer, **LIMITS), ("prompt", "completion"), expected, tokenizer)
