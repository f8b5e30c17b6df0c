"""Budgets of a step by the TPU compiler: bytes next to optax.adamw, and temporary arrays.

`make test` puts the compiler into a folder of its own (``.venv/tpu``): among the packages of an
environment it would make every program look for a TPU first.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = Path(sys.prefix) / "tpu"
HAS_COMPILER = (COMPILER / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None

PROGRAM = """
import json, sys
from train.bench import cases, compiled
shapes = cases.large_shapes()
wanted = json.loads(sys.argv[1])
compared = [case for case in cases.cases() if case.name in wanted]
passes = compiled.search_passes(2**22, cases.TIES_DENSITY)
rows = compiled.step_figures("v5p:2x2x1", shapes, compared, passes, lambda name: None)
print(json.dumps([rows, compiled.leaf_bytes(shapes, 4)]))
"""


def figures(*names):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "PYTHONPATH": os.pathsep.join([str(COMPILER), str(Path(__file__).parents[2])]),
    }
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(names)]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, leaf = json.loads(done.stdout.splitlines()[-1])
    return {row["optimizer"]: row for row in rows}, leaf


needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="the TPU compiler is not built for this platform"
)


@needs_compiler
def test_random_masks_and_sampled_thresholds_ride_along():
    from train.bench import cases

    rows, leaf = figures(cases.BASELINE, cases.DARE, cases.TIES_SAMPLED)
    assert rows[cases.DARE]["bytes_ratio"] <= 1.08
    assert rows[cases.DARE]["temp_bytes"] == 0
    assert rows[cases.TIES_SAMPLED]["bytes_ratio"] <= 1.5
    assert rows[cases.TIES_SAMPLED]["temp_bytes"] < leaf


@needs_compiler
@pytest.mark.slow
def test_an_exact_threshold_stays_below_three_steps():
    from train.bench import cases

    rows, _ = figures(cases.BASELINE, cases.TIES_EXACT)
    assert rows[cases.TIES_EXACT]["bytes_ratio"] <= 3
