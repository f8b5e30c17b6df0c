"""Mixtures: exact shares in every epoch, rows stored once, errors that name the weight."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from train.data import TokenDataset, make_buckets, make_loader, mix, tokenize_sft

LIMITS: Any = {"max_prompt_length": 100, "max_completion_length": 100}


def make_part(tokenizer, word, rows) -> TokenDataset:
    records = [
        {"prompt": f"{word} {n}", "completion": f" {word * (n % 3 + 1)}"} for n in range(rows)
    ]
    records.append({"prompt": word, "completion": f" a</s> {word}"})  # is dropped
    return tokenize_sft(records, tokenizer, **LIMITS)


@pytest.fixture
def parts(plain_tokenizer):
    return [make_part(plain_tokenizer, word, n) for word, n in (("Rome", 40), ("colour", 20))]


def epochs_of(dataset, batch_size, count, seed=0):
    per_epoch = dataset.rows_per_epoch // batch_size
    buckets = make_buckets(dataset, batch_size)
    loader = make_loader(dataset, batch_size, seed=seed, buckets=buckets)
    return [np.concatenate([next(loader)["index"] for _ in range(per_epoch)]) for _ in range(count)]


def test_every_part_comes_as_often_as_its_weight_says(parts):
    mixed = mix(parts, [1, 2.5])
    assert len(mixed) == 60
    assert mixed.rows_per_epoch == 40 + 50
    extra = []
    for epoch in epochs_of(mixed, 10, 3):
        counts = Counter(epoch.tolist())
        assert all(counts[row] == 1 for row in range(40))
        assert {counts[row] for row in range(40, 60)} == {2, 3}
        extra.append({row for row in range(40, 60) if counts[row] == 3})
        assert len(extra[-1]) == 10
    assert extra[0] != extra[1]


def test_a_small_weight_draws_other_rows_in_every_epoch(parts):
    first, second = epochs_of(mix(parts, [0.25, 1]), 5, 2)
    drawn = [set(epoch[epoch < 40]) for epoch in (first, second)]
    assert [len(one) for one in drawn] == [10, 10]
    assert drawn[0] != drawn[1]
    np.testing.assert_array_equal(epochs_of(mix(parts, [0.25, 1]), 5, 1)[0], first)


def test_rows_keep_their_tokens_and_the_report_counts_all(parts):
    mixed = mix(parts, [1, 1])
    start = 0
    for part in parts:
        for name in ("prompt", "completion"):
            for row in range(len(part)):
                ours, theirs = (
                    arrays[f"{name}_tokens"][at][arrays[f"{name}_mask"][at]]
                    for arrays, at in ((mixed.arrays, start + row), (part.arrays, row))
                )
                np.testing.assert_array_equal(ours, theirs)
        start += len(part)
    assert mixed.report.records == 62
    assert mixed.report.rows == 60
    assert mixed.report.dropped == {"the completion contains the end token": 2}
    lengths = mixed.arrays["prompt_mask"].sum(axis=1)
    assert mixed.report.prompts.mean == pytest.approx(lengths.mean())
    assert mixed.report.prompts.largest == lengths.max()


def test_what_cannot_be_mixed_is_explained(parts):
    with pytest.raises(ValueError, match=r"weight 0\.01 leaves none of 20 rows; raise it"):
        mix(parts, [1, 0.01])
    with pytest.raises(ValueError, match="A mixture of data sets needs buckets"):
        make_loader(mix(parts, [1, 1]), 4)
