"""The abstract step of a plan against the state and memory of the same step on eight devices."""

import dataclasses

import pytest

from tests.train.builders import make_plan_config
from tests.train.tiny_models import save_model
from tests.virtual_devices import run_python
from train.config import (
    LoraOptions,
    UserError,
)
from train.models.hf_names import decoder_leaves
from train.plan.measure import make_plan
from train.plan.program import make_program, read_shape
from train.plan.target import read_target

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
from tests.train.builders import make_plan_config
from train.config import MeshOptions
from train.models import from_hf, layer_axes, split_model
from train.optimizers.build import make_optimizer
from train.optimizers.schedules import make_schedule
from train.plan.program import make_program, read_shape
from train.distributed.mesh import make_mesh, on_mesh
from train.training.step import init_state

config = make_plan_config(sys.argv[1])
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


@pytest.mark.slow
def test_state_and_memory_are_those_of_the_run(tmp_path):
    save_model("qwen2-tied", tmp_path)
    assert "as planned" in run_python("-c", PROGRAM, str(tmp_path), devices=8, timeout=200)


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


def state_with(storage):
    config = make_plan_config("llama-3-8b")
    dtype = None if storage == "recompute" else "bfloat16"
    merging = dataclasses.replace(config.optimizer, storage=storage, delta_dtype=dtype)
    model, target = read_shape("llama-3-8b"), read_target("gpu:8x80")
    config = dataclasses.replace(config, optimizer=merging)
    return make_plan(config, model, target).memory.state


def test_a_delta_on_the_host_leaves_the_chips():
    dense, there = state_with("dense"), state_with("pinned_host")
    # merge/alpha, its total and the count of roundings stay.
    assert dense.on_host == there.delta - 12 == 0
    assert there.on_host == dense.delta - 12
    assert dense.total - there.total == there.on_host


def test_a_delta_that_is_computed_anew_takes_two_more_models():
    dense, anew = state_with("dense"), state_with("recompute")
    assert anew.parameters == dense.parameters
    assert anew.delta - 12 == 2 * anew.parameters
    assert anew.on_host == 0


def test_a_host_has_no_memory_besides_its_own():
    config = make_plan_config("llama-3-8b")
    merging = dataclasses.replace(config.optimizer, storage="pinned_host")
    config = dataclasses.replace(config, optimizer=merging)
    with pytest.raises(UserError, match=r"storage is pinned_host.*topology is cpu:1"):
        make_plan(config, read_shape("llama-3-8b"), read_target("cpu:1"))


def test_runs_that_train_adapters_are_refused():
    with pytest.raises(UserError, match=r"model\.lora is set"):
        make_program(
            make_plan_config("llama-3-8b", lora=LoraOptions()), read_shape("llama-3-8b"), None
        )
