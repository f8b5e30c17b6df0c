"""The abstract step of a plan against the state and memory of the same step on eight devices."""

import dataclasses
import os
import subprocess
import sys

import pytest

from tests.train.tiny_models import save_model
from train.config import (
    DataOptions,
    DPOConfig,
    LoraOptions,
    OptimizerOptions,
    PolicyOptions,
    TrainerOptions,
    UserError,
)
from train.models.hf_names import decoder_leaves
from train.plan.program import make_program, read_shape

# Parameters of the published checkpoints, as their index files and model cards count them.
PARAMETERS = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen1.5-7b": 7_721_324_544,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-72b": 72_706_203_648,
}

PROGRAM = """
import sys
import jax
from tests.train.test_plan_program import make_config
from train.config import MeshOptions
from train.models import from_hf, layer_axes, split_model
from train.optimizers import make_optimizer, make_schedule
from train.plan.program import make_program, read_shape
from train.sharding import make_mesh, on_mesh
from train.step import init_state

config = make_config(sys.argv[1])
mesh = make_mesh(MeshOptions(fsdp=4, tensor=2))
program = make_program(config, read_shape(sys.argv[1]), mesh)
params = split_model(from_hf(sys.argv[1], mesh=mesh))[1]
schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 10)
tx = make_optimizer(config.optimizer, schedule, layer_axes=layer_axes, steps=10)
delta = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
state = init_state(params, tx, delta)

def describe(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(p): (x.shape, x.dtype, x.sharding.spec) for p, x in leaves}

found, expected = describe(program.state), describe(state)
different = {path: (found.get(path), expected.get(path)) for path in found | expected}
different = {path: pair for path, pair in different.items() if pair[0] != pair[1]}
assert not different, different
with on_mesh(mesh):
    compiled = program.step.lower(program.state, program.batch).compile()
first = jax.devices()[0]
held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(state)
    for shard in leaf.addressable_shards
    if shard.device == first
)
reported = compiled.memory_analysis().argument_size_in_bytes
assert held <= reported <= 1.1 * held, (held, reported)
print("as planned")
"""


def make_config(path, **model):
    optimizer = {"alpha": 5e-7, "density": 0.01, "delta_dtype": "bfloat16"}
    return DPOConfig(
        output_dir="unused",
        model=PolicyOptions(path=path, base="unused", **model),
        data=DataOptions(path="unused", max_prompt_length=8, max_completion_length=8),
        optimizer=OptimizerOptions(name="on_dare", learning_rate=1e-6, **optimizer),
        trainer=TrainerOptions(batch_size=8, steps=10),
    )


@pytest.mark.slow
def test_state_and_memory_are_those_of_the_run(tmp_path):
    save_model("qwen2-tied", tmp_path)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "as planned" in done.stdout


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_shapes_have_the_parameters_of_the_published_models(name, count):
    total = 0
    for leaf in decoder_leaves(read_shape(name)).values():
        size = 1
        for axis in leaf.shape:
            size *= axis
        total += size
    assert total == count


def test_unknown_shapes_name_the_known_ones():
    with pytest.raises(UserError, match=r"model.path: .*llama-3-70b"):
        read_shape("no-such-model")


@pytest.mark.parametrize("storage", ["recompute", "pinned_host"])
def test_deltas_that_are_not_on_the_chips_are_refused(storage):
    config = make_config("llama-3-8b")
    merging = dataclasses.replace(config.optimizer, storage=storage)
    config = dataclasses.replace(config, optimizer=merging)
    with pytest.raises(UserError, match=f"optimizer.storage is {storage}; .* dense or sparse"):
        make_program(config, read_shape("llama-3-8b"), None)


def test_runs_that_train_adapters_are_refused():
    with pytest.raises(UserError, match=r"model\.lora is set"):
        make_program(make_config("llama-3-8b", lora=LoraOptions()), read_shape("llama-3-8b"), None)
