"""Buckets: little padding, few shapes, and batches that are the same everywhere and every time."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from train.data import (
    Lengths,
    TokenDataset,
    TokenReport,
    make_buckets,
    make_loader,
    saves_by_sharing,
)
from train.data.buckets import _divide, default_buckets
from train.data.layout import padding_share
from train.data.padding import pad_rows

REPORT = TokenReport(0, 0, {}, 0, 0, 0, Lengths(1, 1), Lengths(1, 1))


def make_pairs(rows=400, seed=0, longest_prompt=120):
    """Lengths spread as in real data: many short, few long; tokens name their row."""
    rng = np.random.default_rng(seed)
    arrays = {"index": np.arange(rows, dtype=np.int32)}
    for name, longest in (("prompt", longest_prompt), ("chosen", 96), ("rejected", 96)):
        counts = np.clip(rng.lognormal(3, 0.8, rows).astype(int), 1, longest)
        tokens = [[1 + row] * count for row, count in enumerate(counts)]
        width = longest if name == "prompt" else 96
        arrays[f"{name}_tokens"], arrays[f"{name}_mask"] = pad_rows(
            tokens, width, 0, left=name == "prompt"
        )
    return TokenDataset(arrays, REPORT, share_prompts=True)


def take(loader, count):
    return [next(loader) for _ in range(count)]


def shape_of(batch):
    return tuple(column.shape for column in batch.values())


@pytest.mark.parametrize("share_prompts", [True, False])
def test_an_epoch_holds_every_row_once_whole_and_with_little_padding(share_prompts):
    data = dataclasses.replace(make_pairs(), share_prompts=share_prompts)
    buckets = make_buckets(data, 8, 10)
    batches = take(make_loader(data, 8, buckets=buckets), 50)
    assert sorted(np.concatenate([batch["index"] for batch in batches])) == list(range(400))
    for batch in batches:
        for name in ("prompt", "chosen", "rejected"):
            whole = data.arrays[f"{name}_mask"][batch["index"]].sum(axis=1)
            np.testing.assert_array_equal(batch[f"{name}_mask"].sum(axis=1), whole)
        if share_prompts:
            real = batch["joined_parts"] >= 0
            expected = np.where(real, 1 + batch["index"][:, None], 0)
            np.testing.assert_array_equal(batch["joined_ids"], expected)
    assert len(set(map(shape_of, batches))) <= 11  # and one where a batch spans buckets
    plain = take(make_loader(data, 8, buckets=make_buckets(data, 8, 1)), 50)
    assert len(set(map(shape_of, plain))) == 1
    shares = [np.mean([padding_share(batch) for batch in some]) for some in (batches, plain)]
    assert shares[0] < (0.25 if share_prompts else 0.55)
    assert shares[1] > shares[0] + 0.2
    figure = buckets.padding_share(data.arrays)
    columns = ["joined_ids"] if share_prompts else ["prompt_mask", "chosen_mask"]
    sizes = [sum(batch[name].size for name in columns) for batch in batches]
    mean = np.average([padding_share(batch) for batch in batches], weights=sizes)
    # Which bucket's rows meet those of the next one differs by the draw.
    assert figure == pytest.approx(mean, abs=0.02)


def test_batches_are_a_function_of_seed_and_position():
    data = make_pairs()
    buckets = make_buckets(data, 8)

    def order(seed, count=120):
        loader = make_loader(data, 8, seed=seed, buckets=buckets)
        return [tuple(batch["index"]) for batch in take(loader, count)]

    assert order(1) == order(1)
    epochs = [set(map(frozenset, order(1)[start : start + 50])) for start in (0, 50)]
    assert len(epochs[0] & epochs[1]) < 5  # other rows meet in the next epoch
    assert not set(order(1)) & set(order(2))


@pytest.mark.parametrize("position", [0, 3, 71])
def test_a_restored_loader_goes_on_with_the_same_batches(position):
    data = make_pairs()
    loader = make_loader(data, 8, seed=3, buckets=make_buckets(data, 8))
    take(loader, position)
    state = json.loads(json.dumps(loader.get_state()))
    restored = make_loader(data, 8, seed=3, buckets=make_buckets(data, 8))
    take(restored, 2)
    restored.set_state(state)
    for left, right in zip(take(loader, 60), take(restored, 60), strict=True):
        assert left.keys() == right.keys()
        assert all((left[name] == right[name]).all() for name in left)


def test_processes_share_the_batches_and_shapes_of_one():
    data = make_pairs()

    def loader(shard):
        return take(make_loader(data, 8, seed=4, buckets=make_buckets(data, 8), shard=shard), 60)

    for whole, *shares in zip(loader(((0,), 1)), loader(((0,), 2)), loader(((1,), 2)), strict=True):
        for name, column in whole.items():
            np.testing.assert_array_equal(np.concatenate([one[name] for one in shares]), column)


def test_long_rows_are_left_over_no_more_often_than_short_ones():
    data = make_pairs(403)
    buckets = make_buckets(data, 8, 12)
    missing = []
    for seed in range(40):
        seen = np.concatenate(
            [b["index"] for b in take(make_loader(data, 8, seed=seed, buckets=buckets), 50)]
        )
        missing += sorted(set(range(403)) - set(seen))
    assert len(missing) == 120
    total = data.arrays["prompt_mask"].sum(1) + data.arrays["chosen_mask"].sum(1)
    ranks = np.argsort(np.argsort(total))[missing] / 403
    assert 0.4 < ranks.mean() < 0.6


def test_bounds_are_the_best_there_are():
    values = np.random.default_rng(0).integers(1, 80, 60)
    widths = -(-values // 8) * 8

    def cost(bounds):
        padded = np.array(sorted(bounds))[np.searchsorted(sorted(bounds), widths)]
        return padded.sum()

    candidates = sorted(set(widths))
    best = min(cost({*some, candidates[-1]}) for some in itertools.combinations(candidates, 2))
    ranges = _divide(values, 3)
    found = sum(widths[ranges == one].max() * (ranges == one).sum() for one in range(3))
    assert found == best


def test_one_bucket_for_few_batches():
    assert [default_buckets(batches) for batches in (7, 50, 10_000)] == [1, 3, 16]
    assert len(set(make_buckets(make_pairs(400), 4, steps=20).of_row)) == 1
    assert len(set(make_buckets(make_pairs(400), 4).of_row)) > 3
    buckets = make_buckets(make_pairs(20), 8)
    assert len(buckets.widths) == 1
    assert "one shape" in buckets.describe(make_pairs(20).arrays)


def test_prompts_are_shared_where_they_are_worth_it():
    assert saves_by_sharing(make_pairs().arrays)
    assert not saves_by_sharing(make_pairs(longest_prompt=5).arrays)
    examples = {name: column for name, column in make_pairs().arrays.items() if "rej" not in name}
    assert not saves_by_sharing(examples)


def test_buckets_need_whole_shuffled_batches():
    data = make_pairs(20)
    with pytest.raises(ValueError, match="buckets need shuffle=True"):
        make_loader(data, 4, shuffle=False, buckets=make_buckets(data, 4))
