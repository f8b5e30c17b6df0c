"""Mismatched completions of KTO: TRL's pairing, and never an answer on its own prompt."""

from __future__ import annotations

import numpy as np
import pytest

from tests.train.tiny_runs import make_records, make_tokenizer
from train.data import make_loader, tokenize_unpaired
from train.data.mismatched import in_random_order, rotation, with_kl_completions


@pytest.fixture(scope="module")
def answers():
    """Six preferences as twelve labelled answers."""
    return tokenize_unpaired(
        make_records(6), make_tokenizer(), max_prompt_length=64, max_completion_length=16
    )


def trl_pairing(rows: int, batch_size: int) -> list[int]:
    """`KTOTrainer`'s `add_kl_completion_ids`, mapped over batches."""
    numbers, found = list(range(rows)), []
    for start in range(0, rows, batch_size):
        batch = numbers[start : start + batch_size]
        found += [batch[-1], *batch[:-1]]
    return found


@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (12, 5), (11, 4), (8, 8), (7, 20)])
def test_pairing_is_trl_s(rows, batch_size):
    assert rotation(rows, batch_size).tolist() == trl_pairing(rows, batch_size)


@pytest.mark.parametrize(("rows", "batch_size"), [(9, 4), (5, 2), (21, 20), (3, 2)])
def test_a_row_left_over_never_borrows_its_own_answer(rows, batch_size):
    """TRL pairs it with itself, so that its log-ratio is no sample of a mismatch."""
    source = rotation(rows, batch_size)
    assert trl_pairing(rows, batch_size)[-1] == rows - 1
    assert (source != np.arange(rows)).all()
    assert sorted(source) == list(range(rows))
    whole = (rows - 1) // batch_size * batch_size - batch_size
    assert source[:whole].tolist() == trl_pairing(rows, batch_size)[:whole]


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (6, 1)])
def test_one_row_has_no_mismatch(rows, batch_size):
    with pytest.raises(ValueError, match=f"at least 2 rows.*got {rows} .* batches of {batch_size}"):
        rotation(rows, batch_size)


def test_batches_hold_their_own_answers_on_other_prompts(answers):
    data = with_kl_completions(in_random_order(answers, 3), 4)
    batches = make_loader(data, 4, shuffle=False)
    for _ in range(2 * len(data) // 4):  # two epochs
        batch = next(batches)
        np.testing.assert_array_equal(batch["kl_tokens"], np.roll(batch["completion_tokens"], 1, 0))
        np.testing.assert_array_equal(batch["kl_mask"], np.roll(batch["completion_mask"], 1, 0))


def test_the_order_moves_whole_rows(answers):
    moved = in_random_order(answers, 3)
    order = moved.arrays["index"]
    assert sorted(order) == list(range(len(answers)))
    assert (order != np.arange(len(answers))).any()
    for name, column in answers.arrays.items():
        np.testing.assert_array_equal(moved.arrays[name], column[order])
    np.testing.assert_array_equal(in_random_order(answers, 3).arrays["index"], order)


def test_a_flipped_label_is_other_data(answers):
    flipped = answers.with_columns(label=~answers.arrays["label"])
    assert flipped.fingerprint() != answers.fingerprint()
