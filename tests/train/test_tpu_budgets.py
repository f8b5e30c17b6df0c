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
from tests.bench import cases
from tests.bench import compiled
shapes = cases.large_shapes()
wanted = json.loads(sys.argv[1])
compared = [case for case in cases.cases() if case.name in wanted]
passes = compiled.search_passes(2**22, cases.TIES_DENSITY)
rows = compiled.step_figures("v5p:2x2x1", shapes, compared, passes, lambda name: None)
print(json.dumps([rows, compiled.leaf_bytes(shapes, 4)]))
"""

ATTENTION = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.bench.compiled import make_mesh
from train.models.splash import splash_attention
mesh = make_mesh("v5p:2x2x1")
rows = P("fsdp", None, None, None)
place = lambda heads: jax.ShapeDtypeStruct((8, 2048, heads, 128), jnp.bfloat16,
                                           sharding=NamedSharding(mesh, rows))
real = jax.ShapeDtypeStruct((8, 2048), bool, sharding=NamedSharding(mesh, P("fsdp")))
loss = lambda *x: jnp.sum(splash_attention(*x).astype(jnp.float32) ** 2)
with jax.set_mesh(mesh):
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = gradient.lower(place(8), place(2), place(2), real).compile()
print(compiled.memory_analysis().temp_size_in_bytes)
"""


def run(program, *arguments):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "PYTHONPATH": os.pathsep.join([str(COMPILER), str(Path(__file__).parents[2])]),
    }
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def figures(*names):
    rows, leaf = run(PROGRAM, json.dumps(names))
    return {row["optimizer"]: row for row in rows}, leaf


needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="the TPU compiler is not built for this platform"
)


@needs_compiler
def test_random_masks_and_sampled_thresholds_ride_along():
    from tests.bench import cases

    rows, leaf = figures(cases.BASELINE, cases.DARE, cases.TIES_SAMPLED)
    assert rows[cases.DARE]["bytes_ratio"] <= 1.08
    assert rows[cases.DARE]["temp_bytes"] == 0
    assert rows[cases.TIES_SAMPLED]["bytes_ratio"] <= 1.5
    assert rows[cases.TIES_SAMPLED]["temp_bytes"] < leaf


@needs_compiler
@pytest.mark.slow
def test_an_exact_threshold_stays_below_three_steps():
    from tests.bench import cases

    rows, leaf = figures(cases.BASELINE, cases.TIES_EXACT, cases.TIES_FUSED_EXACT)
    assert rows[cases.TIES_EXACT]["bytes_ratio"] <= 3
    assert rows[cases.TIES_FUSED_EXACT]["bytes_ratio"] <= 3
    assert rows[cases.TIES_FUSED_EXACT]["temp_bytes"] < leaf


@needs_compiler
@pytest.mark.slow
def test_splash_attention_holds_no_matrix_of_all_pairs():
    # Of 2 rows a chip, 8 heads and 2048 positions, in float32.
    pairs = 4 * 2 * 8 * 2048**2
    assert run(ATTENTION) < pairs / 4
