"""Labelled answers: formats, labels that stay with their rows, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from trl.data_utils import unpair_preference_dataset

from tests.train.tiny_runs import make_records, make_tokenizer
from train.data import DataError, normalise_unpaired, tokenize_sft, tokenize_unpaired

LIMITS = {"max_prompt_length": 64, "max_completion_length": 16}


def labelled(count: int = 5):
    return [
        {"prompt": r["prompt"], "completion": r["chosen"], "label": n % 3 == 0}
        for n, r in enumerate(make_records(count))
    ]


def test_tokens_are_those_of_sft_and_labels_come_along():
    records = labelled()
    found = tokenize_unpaired(records, make_tokenizer(), **LIMITS)
    wanted = tokenize_sft(records, make_tokenizer(), **LIMITS)
    for name, column in wanted.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], column)
    assert found.arrays["label"].tolist() == [record["label"] for record in records]
    assert found.arrays["label"].dtype == bool


def test_labels_stay_with_their_rows_when_others_are_dropped():
    records = labelled()
    records[1] = {
        "prompt": records[1]["prompt"],
        "completion": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
        "label": True,
    }
    found = tokenize_unpaired(records, make_tokenizer(), **LIMITS)
    assert found.report.dropped == {"the answer is more than one message": 1}
    assert found.arrays["label"].tolist() == [True, False, True, False]


def test_pairs_become_two_answers_as_in_trl():
    records = [{"prompt": "a" * n, "chosen": f" yes {n}", "rejected": " no"} for n in (1, 2, 3)]
    found = [one for record in records for one in normalise_unpaired(record)]
    wanted = list(unpair_preference_dataset(Dataset.from_list(records)))

    def key(row):
        return row["prompt"], row["completion"], row["label"]

    ours = [{"prompt": o.prompt, "completion": o.completion, "label": o.label} for o in found]
    assert sorted(map(key, ours)) == sorted(map(key, wanted))


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_labels(label):
    [one] = normalise_unpaired({"prompt": "a", "completion": "b", "label": label})
    assert one.label is bool(label)


@pytest.mark.parametrize("label", ["true", 2, 0.5, -1])
def test_other_labels_are_refused(label):
    with pytest.raises(DataError, match=r"'label' must be true \(desirable\) or false, found"):
        normalise_unpaired({"prompt": "a", "completion": "b", "label": label})


def test_missing_label():
    with pytest.raises(DataError, match=r"'label' is missing; found the fields 'prompt', 'comple"):
        normalise_unpaired({"prompt": "a", "completion": "b"})
