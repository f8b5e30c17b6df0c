"""Processes that a cluster started and that come late may be started again; wrong settings may not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.train.groups import free_port
from train.config import DistributedOptions, UserError
from train.distributed.clusters import Group
from train.distributed.join import joined
from train.distributed.stop import TryAgain

# Each way of finding the others in a process of its own, because JAX joins once.
PROGRAM = """
import sys
import jax
import train.cli, train.distributed.join
from train.distributed.clusters import Group
def late(*args, **options):
    raise RuntimeError(sys.argv[1])
jax.distributed.initialize = late
train.distributed.join.find_group = lambda *given: Group(None, 2, None, None, sys.argv[2] or None)
needed = ["model.path", "data.path", "output_dir", "trainer.batch_size", "optimizer.learning_rate"]
flags = [part for name in needed for part in (f"--{name}", "1")]
sys.exit(train.cli.main(["sft", *flags]))
"""


@pytest.mark.parametrize(
    ("words", "cluster", "status"),
    [
        ("Failed to recognize coordinator address on-ties-slice-0-0", "GKE", 75),
        ("DEADLINE_EXCEEDED: Barrier timed out.", "Slurm", 75),
        ("DEADLINE_EXCEEDED: Barrier timed out.", "", 2),
        ("expected HOSTNAME env variable to be defined", "a Kubernetes job", 2),
    ],
)
def test_status_where_jax_does_not_join(words, cluster, status):
    command = [sys.executable, "-c", PROGRAM, words, cluster]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == status, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("cluster", "error"), [(None, UserError), ("Open MPI", TryAgain)])
def test_process_that_nobody_answers(cluster, error, monkeypatch):
    group = Group(f"127.0.0.1:{free_port()}", 2, 1, None, cluster)
    monkeypatch.setattr("train.distributed.join.find_group", lambda *given: group)
    with (
        pytest.raises(error, match=r"cannot be reached within 1 s"),
        joined(DistributedOptions(timeout=1)),
    ):
        raise AssertionError
