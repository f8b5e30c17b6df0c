import json
import time

import numpy as np
import pytest

from train.data import Lengths, TokenDataset, TokenReport, make_loader

REPORT = TokenReport(10, 10, {}, 0, 0, 0, Lengths(1, 1), Lengths(1, 1))


def make_dataset(rows, width=4):
    index = np.arange(rows, dtype=np.int32)
    return TokenDataset({"prompt_tokens": index[:, None] + np.zeros(width), "index": index}, REPORT)


def order(loader, batches):
    return [next(loader)["index"].tolist() for _ in range(batches)]


def test_an_epoch_holds_every_row_once_in_a_new_order():
    loader = make_loader(make_dataset(12), 4, seed=1)
    epochs = [np.ravel(order(loader, 3)).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    again = make_loader(make_dataset(12), 4, seed=1)
    assert np.ravel(order(again, 3)).tolist() == epochs[0]
    # No epoch of the next seed is one of these either.
    other = make_loader(make_dataset(12), 4, seed=2)
    assert all(np.ravel(order(other, 3)).tolist() not in epochs for _ in range(3))


def test_columns_stay_together():
    batch = next(make_loader(make_dataset(9), 4, seed=2))
    np.testing.assert_array_equal(batch["prompt_tokens"][:, 0], batch["index"])
    assert batch["index"].shape == (4,)


@pytest.mark.parametrize("position", [0, 1, 7])
def test_a_restored_loader_goes_on_with_the_same_batches(position):
    loader = make_loader(make_dataset(13), 4, seed=3)
    order(loader, position)
    state = json.loads(json.dumps(loader.get_state()))
    expected = order(loader, 8)
    restored = make_loader(make_dataset(13), 4, seed=3)
    order(restored, 2)
    restored.set_state(state)
    assert order(restored, 8) == expected


def test_rows_that_fill_no_batch_are_left_out():
    loader = make_loader(make_dataset(10), 4, shuffle=False)
    batches = [next(loader)["index"].tolist() for _ in range(4)]
    assert batches == 2 * [[0, 1, 2, 3], [4, 5, 6, 7]]
    loader = make_loader(make_dataset(10), 4)
    epochs = [[next(loader)["index"] for _ in range(2)] for _ in range(2)]
    assert [len(np.unique(epoch)) for epoch in epochs] == [8, 8]


def test_processes_share_the_batches_of_one():
    whole = order(make_loader(make_dataset(20), 4, seed=4), 10)
    shares = [order(make_loader(make_dataset(20), 4, seed=4, shard=((i,), 2)), 10) for i in (0, 1)]
    assert [left + right for left, right in zip(*shares, strict=True)] == whole


def test_a_batch_costs_next_to_nothing():
    loader = make_loader(make_dataset(5_000, width=512), 64)
    next(loader)
    start = time.process_time()
    for _ in range(200):
        next(loader)
    # About 0.3 ms on one core; the bound leaves room for a busy machine.
    assert (time.process_time() - start) / 200 < 3e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 11}, "batch_size 11 is larger than the data set, which has 10 rows"),
        ({"batch_size": 0}, "batch_size must be a positive multiple .* 1, got 0"),
        ({"batch_size": 5, "shard": ((0,), 2)}, "multiple of its number of parts 2, got 5"),
        (
            {"batch_size": 4, "shard": ((2,), 2)},
            r"shard must be \(parts, count\).* got \(\(2,\), 2\)",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_loader(make_dataset(10), **settings)


def test_columns_are_added_and_do_not_change_the_fingerprint():
    dataset = make_dataset(10)
    scored = dataset.with_columns(reference_chosen_logps=np.arange(10.0))
    assert scored.fingerprint() == dataset.fingerprint() != make_dataset(11).fingerprint()
    assert make_dataset(10, width=5).fingerprint() != dataset.fingerprint()
    batch = next(make_loader(scored, 4))
    np.testing.assert_array_equal(batch["reference_chosen_logps"], batch["index"])
    with pytest.raises(ValueError, match="Column 'x' has 3 rows, the data set has 10"):
        dataset.with_columns(x=np.zeros(3))
