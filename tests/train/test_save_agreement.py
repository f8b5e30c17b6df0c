"""A save that fails on one of several processes: all learn of it, and none waits for another."""

from __future__ import annotations

import time

import pytest

from tests.train.groups import run_group, statuses

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
@pytest.mark.parametrize("case", ["checksums", "first", "second"])
def test_a_save_that_fails_on_one_process_is_given_up_by_all(case, tmp_path):
    arguments = [str(tmp_path / "c"), case]
    group = run_group(
        tmp_path, arguments, processes=2, devices=2, program=SETUP + FAILS, timeout=120
    )
    assert statuses(group) == [0, 0]
    where = 1 if case == "second" else 0
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
