"""Saves of several processes: each hashes its own files, and all learn of a failure of one."""

from __future__ import annotations

import json
import time

import pytest
from jax._src import distributed  # pins the private name that `SaveAgreement` uses

from tests.train.groups import run_group, statuses
from train.files.checksums import find_damage
from train.training.checkpoint import _writer

# Process WHERE has no room for its part of step 2; of process 0 that may be the checksums.
SETUP = """
import errno, os, sys
from pathlib import Path
from train.config import DistributedOptions, UserError
from train.distributed.join import joined

directory, case = Path(sys.argv[1]), sys.argv[2]

def refusing(function):
    def refuse(*args, **options):
        function(*args, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return refuse

def run(body):
    with joined(DistributedOptions()):
        import jax, jax.numpy as jnp
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        import orbax.checkpoint._src.futures.future as futures
        import train.training.checkpoint
        from train.training.checkpoint import Checkpoints
        rows = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec("x"))
        def state(step):
            return {"step": jax.jit(lambda: jnp.full(4, step), out_shardings=rows)()}
        warn = lambda message: print("WARNED", message, flush=True)
        with Checkpoints(directory, keep=1, warn=warn) as saved:
            saved.save(1, state(1), {})
            assert saved.wait()
            where, target, name = {
                "checksums": (0, train.training.checkpoint, "write_manifest"),
                "own checksums": (1, train.training.checkpoint, "hash_files"),
                "first": (0, futures.ChainedFuture, "result"),
                "second": (1, futures.ChainedFuture, "result"),
                "begin": (1, train.training.checkpoint.ocp.CheckpointManager, "save"),
            }[case]
            real = getattr(target, name)
            if jax.process_index() == where:
                setattr(target, name, refusing(real))
            body(jax.process_index(), saved, state)
            setattr(target, name, real)
            saved.save(3, state(3), {})
            assert saved.wait() and saved.steps() == [3] and saved.damage(3) is None
"""
FAILS = """
def body(process, saved, state):
    for _ in range(2):
        saved.save(2, state(2), {})
        assert not saved.wait()
        assert saved.steps() == [1] and saved.damage(1) is None
run(body)
"""
ENDS = """
def body(process, saved, state):
    saved.save(2, state(2), {})
    if process == 0 and case != "begin":
        raise UserError("the log cannot be written.")
    saved.wait()
try:
    run(body)
except UserError as error:
    print("error:", error, flush=True)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["checksums", "own checksums", "first", "second"])
def test_a_save_that_fails_on_one_process_is_given_up_by_all(case, tmp_path):
    arguments = [str(tmp_path / "c"), case]
    group = run_group(
        tmp_path, arguments, processes=2, devices=2, program=SETUP + FAILS, timeout=120
    )
    assert statuses(group) == [0, 0]
    where = 1 if case in ("second", "own checksums") else 0
    for number, one in enumerate(group):
        words = "No space left on device"
        if number != where:
            words = f"process {where}: {words}"
        warned = [line for line in one.log.splitlines() if line.startswith("WARNED")]
        expected = (
            f"the checkpoint of step 2 could not be written ({words}); the one of step 1 stays."
        )
        assert warned == [f"WARNED {expected}"] * 2
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["3"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["checksums", "second"])
def test_an_error_during_a_failed_save_is_told_at_once(case, tmp_path):
    arguments, start = [str(tmp_path / "c"), case], time.monotonic()
    group = run_group(
        tmp_path, arguments, processes=2, devices=2, program=SETUP + ENDS, timeout=120
    )
    assert [one.status for one in group] == [2, 2], [one.log[-2500:] for one in group]
    assert "error: the log cannot be written." in group[0].log
    assert "ended with an error: the log cannot be written" in group[1].log
    assert time.monotonic() - start < 60
    assert [path.name for path in (tmp_path / "c").iterdir() if path.name.isdigit()] == ["1"]


@pytest.mark.slow
def test_a_failure_that_the_others_do_not_know_of_ends_all(tmp_path):
    arguments = [str(tmp_path / "c"), "begin"]
    group = run_group(
        tmp_path, arguments, processes=2, devices=2, program=SETUP + ENDS, timeout=120
    )
    assert [one.status for one in group] == [2, 2], [one.log[-2500:] for one in group]
    words = "the checkpoint of step 2 could not be written (No space left on device); the one of"
    assert f"error: {words}" in group[1].log
    assert f"ended with an error: {words}" in group[0].log


HASHES = """
import json, sys
from pathlib import Path
from train.config import DistributedOptions
from train.distributed.join import joined

with joined(DistributedOptions()):
    import jax, jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    import train.files.checksums as checksums
    from train.training.checkpoint import Checkpoints
    read, real = [], checksums.hash_file
    def hash_file(path):
        read.append(str(path).replace(".orbax-checkpoint-tmp", ""))
        return real(path)
    checksums.hash_file = hash_file
    mesh = Mesh(jax.devices(), "x")
    spread, same = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["x"], []))
    state = {"spread": jnp.arange(40.0), "same": jnp.ones(3)}
    state = jax.device_put(state, {"spread": spread, "same": same})
    with Checkpoints(Path(sys.argv[1])) as saved:
        saved.save(1, state, {})
        assert saved.wait()
        written, read[:] = list(read), []
        assert saved.damage(1) is None
        checked, read[:] = list(read), []
        if jax.process_index() == 1:
            (file,) = Path(sys.argv[1], "1", "state", "ocdbt.process_1").glob("manifest*")
            file.write_bytes(bytes(file.stat().st_size))
        damage = saved.damage(1)
    print("READ", json.dumps([written, checked, damage]), flush=True)
"""


@pytest.mark.slow
def test_every_process_hashes_its_own_files_and_all_tell_of_damage(tmp_path):
    arguments = [str(tmp_path / "c")]
    group = run_group(tmp_path, arguments, processes=2, devices=4, program=HASHES, timeout=120)
    assert statuses(group) == [0, 0]
    said = [line for one in group for line in one.log.splitlines() if line.startswith("READ ")]
    listed = json.loads((tmp_path / "c" / "1" / "manifest.json").read_text())["files"]
    assert {_writer(name) for name in listed} == {None, 0, 1}
    for number, line in enumerate(said):
        *found, damage = json.loads(line.removeprefix("READ "))
        mine = sorted(name for name in listed if (_writer(name) or 0) == number)
        for paths in found:  # each of its files once, and no other
            parts = (path.split("/") for path in paths)
            names = ["/".join(part[part.index("c") + 2 :]) for part in parts]
            assert sorted(names) == mine
        name = "state/ocdbt.process_1/manifest.ocdbt"
        assert damage == f"the content of {name} has changed since it was written"
    assert find_damage(tmp_path / "c" / "1") == damage  # one process reads the files of all


def test_who_wrote_a_file():
    assert _writer("state/ocdbt.process_12/d/0123") == 12
    assert _writer("state/array_metadatas/process_1") == 1
    for name in ("state/manifest.ocdbt", "data/metadata", "state/d/process_1x", "state/process_"):
        assert _writer(name) is None


def test_the_private_name_is_there():
    assert hasattr(distributed.global_state, "client")
