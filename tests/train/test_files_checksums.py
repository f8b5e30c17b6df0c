"""Damage of every kind is found, and nothing else."""

from __future__ import annotations

import hashlib
import json

import pytest

from train.files.checksums import find_damage, write_manifest


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "deep" / "er" / "b.bin").write_bytes(bytes(range(256)))
    (tmp_path / "times").write_bytes(b"1")
    write_manifest(tmp_path, ignore="times")
    return tmp_path


def test_checksums_are_sha256(directory):
    listed = json.loads((directory / "manifest.json").read_text())["files"]
    expected = hashlib.sha256(b"abc").hexdigest()
    assert listed["a.bin"] == {"size": 3, "sha256": expected}
    assert set(listed) == {"a.bin", "deep/er/b.bin"}


def test_intact(directory):
    assert find_damage(directory) is None
    (directory / "times").write_bytes(b"22")
    (directory / "new").write_bytes(b"")
    assert find_damage(directory) is None


def test_every_flipped_bit_and_every_cut_is_found(directory):
    file = directory / "deep" / "er" / "b.bin"
    content = file.read_bytes()
    for position in range(0, len(content), 17):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        assert find_damage(directory) == (
            "the content of deep/er/b.bin has changed since it was written"
        )
        file.write_bytes(content[:position])
        assert find_damage(directory) == f"deep/er/b.bin has {position} bytes instead of 256"
    file.unlink()
    assert find_damage(directory) == "deep/er/b.bin: No such file or directory"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": {"a.bin": 3}}'])
def test_damaged_manifest(directory, content):
    (directory / "manifest.json").write_text(content)
    damage = find_damage(directory)
    assert damage is not None
    assert damage.startswith("manifest.json cannot be read")


def test_files_that_others_have_hashed_are_not_read(directory):
    known = {name: {"size": 3, "sha256": "as they say"} for name in ("a.bin", "gone.bin")}
    write_manifest(directory, known, ignore="times")
    listed = json.loads((directory / "manifest.json").read_text())["files"]
    assert listed["a.bin"] == known["a.bin"]
    assert set(listed) == {"a.bin", "deep/er/b.bin"}
    assert find_damage(directory, lambda name: name != "a.bin") is None
    damage = find_damage(directory, lambda name: name == "a.bin")
    assert damage == "the content of a.bin has changed since it was written"


def test_missing_manifest(directory):
    (directory / "manifest.json").unlink()
    assert find_damage(directory) == "manifest.json is missing"
