"""A run unpickles nothing, connects to nothing, starts nothing, and writes into its directory alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny_runs import run_flags, write_inputs

# Records what Python's audit hooks see; files that TensorStore writes are seen on disk.
PROGRAM = """
import json, os, sys

seen = {name: set() for name in ("written", "unpickled", "connected", "started")}
CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def note(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        if args[2] & CHANGING and os.fsdecode(args[0]) != os.devnull:
            seen["written"].add(os.path.abspath(os.fsdecode(args[0])))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
        seen["written"].add(os.path.abspath(os.fsdecode(args[0])))
    elif event in ("os.rename", "os.link", "os.symlink"):
        seen["written"] |= {os.path.abspath(os.fsdecode(path)) for path in args[:2]}
    elif event == "pickle.find_class":
        seen["unpickled"].add(".".join(args[:2]))
    elif event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        seen["connected"].add(str(args[1:]))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        seen["started"].add(str(args[:2]))

sys.dont_write_bytecode = True
import train.cli, train.commands.dpo  # what libraries do on import is theirs
sys.addaudithook(note)
status = train.cli.main(sys.argv[2:])
found = json.dumps({name: sorted(values) for name, values in seen.items()} | {"status": status})
with open(sys.argv[1], "w") as out:
    out.write(found)
"""


def contents(*directories: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file."""
    files = (path for directory in directories for path in directory.rglob("*"))
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> tuple[dict[str, list[str]], Path]:
    place = tmp_path_factory.mktemp("confined")
    inputs, output = write_inputs(place), place / "run"
    around = [place / name for name in ("home", "temporary", "work")]
    for directory in around:
        directory.mkdir()
    places = [*around, Path(inputs["model"]), Path(inputs["base"])]
    before = contents(*places)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HOME": str(around[0]),
        "TMPDIR": str(around[1]),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    flags = run_flags(inputs, output, trainer__save_every=2, trainer__steps=4)
    command = [sys.executable, "-c", PROGRAM, str(place / "seen.json"), "dpo", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=around[2], timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert contents(*places) == before  # in particular by what is not written in Python
    found = json.loads((place / "seen.json").read_text())
    assert found["status"] == 0
    return found, output


def test_nothing_is_written_elsewhere(seen):
    found, output = seen
    inside = [path for path in found["written"] if Path(path).is_relative_to(output)]
    names = {Path(path).name for path in inside}
    assert "metrics.jsonl" in names
    assert any(name.startswith(".run.json.partial-") for name in names)
    others = set(found["written"]) - set(inside)
    assert all(output.is_relative_to(path) for path in others), others  # mkdir(exist_ok=True)


def test_nothing_is_unpickled(seen):
    assert seen[0]["unpickled"] == []


def test_nothing_is_fetched_or_started(seen):
    assert seen[0]["connected"] == []
    assert seen[0]["started"] == []
