"""Directories that appear whole, and what killed processes leave beside them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from train.files.whole import written_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from train.files.whole import written_whole
with written_whole(Path(sys.argv[1])) as partial:
    (partial / "weights").write_text("gigabytes")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def partials(directory):
    return [path for path in directory.iterdir() if path.name.startswith(".out.partial-")]


def test_remains_of_a_killed_process_are_removed(tmp_path):
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", KILLED, out], check=False).returncode == -9
    (left,) = partials(tmp_path)
    with written_whole(out) as partial:
        assert partials(tmp_path) == [partial]
        assert partial != left
        (partial / "weights").write_text("all")
    assert (out / "weights").read_text() == "all"
    assert not partials(tmp_path)


def test_a_restarted_container_has_the_same_process_id(tmp_path):
    with written_whole(tmp_path / "a") as partial:
        name = partial.name.replace(".a.", ".out.")
    left = tmp_path / f"{name[:-8]}00000000"  # as if this process had been killed before
    left.mkdir()
    with written_whole(tmp_path / "out"):
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
    with written_whole(out) as first, written_whole(out) as second:
        assert first.exists()
        assert second != first
    assert set(tmp_path.iterdir()) == {*others, out}


def test_the_directory_is_as_open_as_others(tmp_path):
    (tmp_path / "usual").mkdir()
    with written_whole(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode
