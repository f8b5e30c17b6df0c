"""Files and directories that appear whole, and what killed processes leave beside them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from train.files.whole import is_partial, whole_directory, whole_file, write_json

KILLED = """
import os, signal, sys
from pathlib import Path
from train.files.whole import whole_directory, whole_file
with whole_file(Path(sys.argv[2])) as file, whole_directory(Path(sys.argv[1])) as partial:
    file.write(b"half")
    file.flush()
    (partial / "weights").write_text("gigabytes")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def partials(directory):
    return [path for path in directory.iterdir() if path.name.startswith(".out.partial-")]


def test_remains_of_a_killed_process_are_removed(tmp_path):
    out, file = tmp_path / "out", tmp_path / "file.json"
    write_json(file, [1])
    killed = subprocess.run([sys.executable, "-c", KILLED, out, file], check=False)
    assert killed.returncode == -9
    assert file.read_text() == "[\n  1\n]\n"
    (left,) = partials(tmp_path)
    assert sum(is_partial(path.name) for path in tmp_path.iterdir()) == 2
    with whole_directory(out) as partial:
        assert partials(tmp_path) == [partial]
        assert partial != left
        (partial / "weights").write_text("all")
    assert (out / "weights").read_text() == "all"
    write_json(file, [2])
    assert file.read_text() == "[\n  2\n]\n"
    assert set(tmp_path.iterdir()) == {out, file}


def test_a_restarted_container_has_the_same_process_id(tmp_path):
    with whole_directory(tmp_path / "a") as partial:
        name = partial.name.replace(".a.", ".out.")
    left = tmp_path / f"{name[:-8]}00000000"  # as if this process had been killed before
    left.mkdir()
    with whole_directory(tmp_path / "out"):
        assert not left.exists()


def test_what_others_are_writing_stays(tmp_path):
    """Another process here, one on another host, this one in another thread, and other names."""
    me = f"{socket.gethostname()}-{os.getpid()}"
    names = [f"{socket.gethostname()}-{os.getppid()}-{0:08x}", f"elsewhere-{2**22}-{0:08x}", me]
    others = {tmp_path / f".out.partial-{name}" for name in names}
    others.add(tmp_path / f".out2.partial-{me}-{0:08x}")
    for other in others:
        other.mkdir()
    out = tmp_path / "out"
    with whole_directory(out) as first, whole_directory(out) as second:
        assert first.exists()
        assert second != first
    assert set(tmp_path.iterdir()) == {*others, out}


def test_the_directory_is_as_open_as_others(tmp_path):
    (tmp_path / "usual").mkdir()
    with whole_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path):
    file = tmp_path / "new" / "x.json"
    write_json(file, [1])

    def fail():
        with whole_file(file) as half:
            half.write(b"half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert file.read_text() == "[\n  1\n]\n"
    assert list(file.parent.iterdir()) == [file]


def test_bytes_and_names_are_on_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((os.path.relpath(path, tmp_path), (tmp_path / "out").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with whole_directory(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "weights").write_text("all")
    names = {str(path.relative_to(tmp_path)) for path in [partial, partial / "deep"]}
    names.add(f"{partial.name}/deep/weights")
    assert set(synced[:-1]) == {(name, False) for name in names}
    assert synced[-1] == (".", True)


def test_only_names_that_are_made_here_count_as_remains():
    assert is_partial(".run.json.partial-host-12-0123abcd")
    for name in ("notes.partial", ".notes.partial-x", "run.json", ".lock"):
        assert not is_partial(name)
