"""The cache of the reference's log-probabilities: reused, and never for something else."""

from __future__ import annotations

import numpy as np
import pytest

from tests.train.tiny_runs import make_records, make_tokenizer
from train.config import UserError
from train.data import tokenize_preference
from train.runs.reference import cache_file, read_cache, with_reference, write_cache

PAIR = ("chosen", "rejected")


def tokens(count: int = 5, limit: int = 16):
    return tokenize_preference(
        make_records(count), make_tokenizer(), max_prompt_length=64, max_completion_length=limit
    )


def test_computed_once_and_read_back(tmp_path):
    dataset, calls = tokens(), []

    def compute(given):
        calls.append(given)
        rows = np.arange(len(given), dtype=np.float32)
        return {"chosen": -rows, "rejected": -rows / 3}

    file = cache_file(tmp_path / "cache", "hash", dataset, ["float32"])
    first, second = (with_reference(dataset, file, PAIR, compute) for _ in range(2))
    assert len(calls) == 1
    for name in ("reference_chosen_logps", "reference_rejected_logps"):
        np.testing.assert_array_equal(first.arrays[name], second.arrays[name])
    np.testing.assert_array_equal(second.arrays["reference_chosen_logps"], -np.arange(5.0))
    assert [item.suffix for item in file.parent.iterdir()] == [".npz"]


def test_any_change_makes_another_key(tmp_path):
    dataset = tokens()
    files = {
        cache_file(tmp_path, "hash", dataset, ["float32"]),
        cache_file(tmp_path, "hash", dataset, ["bfloat16"]),
        cache_file(tmp_path, "other weights", dataset, ["float32"]),
        cache_file(tmp_path, "hash", tokens(4), ["float32"]),
        cache_file(tmp_path, "hash", tokens(limit=3), ["float32"]),
    }
    assert len(files) == 5
    with_column = dataset.with_columns(reference_chosen_logps=np.zeros(5, np.float32))
    assert cache_file(tmp_path, "hash", with_column, ["float32"]) in files


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive at all"])
def test_damaged_file(tmp_path, content):
    file = tmp_path / "x.npz"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz are damaged .* delete it"):
        read_cache(file, 5, PAIR)


def test_file_of_another_length(tmp_path):
    file = tmp_path / "x.npz"
    np.savez(file, chosen=np.zeros(4), rejected=np.zeros(4))
    with pytest.raises(UserError, match="not of 5 rows"):
        read_cache(file, 5, PAIR)


def test_two_writers_of_one_file_do_not_meet_even_with_one_process_number(tmp_path, monkeypatch):
    file, scores, savez = tmp_path / "scores.npz", {"chosen": np.ones(3, np.float32)}, np.savez

    def savez_while_another_container_writes(out, **arrays):
        monkeypatch.setattr(np, "savez", savez)
        write_cache(file, scores)
        savez(out, **arrays)

    monkeypatch.setattr(np, "savez", savez_while_another_container_writes)
    write_cache(file, scores)
    found = read_cache(file, 3, ("chosen",))
    assert found is not None
    np.testing.assert_array_equal(found["chosen"], scores["chosen"])
    assert list(tmp_path.iterdir()) == [file]
