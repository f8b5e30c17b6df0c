"""What crosses a network: by the TPU compiler's programs for several slices, and by arithmetic."""

import json

import numpy as np
import pytest

from tests.train.builders import big, needs_compiler, planned, run_with_compiler, tiny
from tests.train.tiny_runs import flags
from train.cli import main
from train.plan.cost import program_cost
from train.plan.network import crossing
from train.plan.target import CHIPS

SLICES, CHIPS_EACH, ROWS, WIDTH = 4, 4, 64, 512
PART = 4.0 * ROWS * WIDTH
KINDS = """
import json
from train.plan.environment import prepare_environment
prepare_environment("4xv5e:2x2")
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from train.config import MeshOptions
from train.plan.cost import program_cost
from train.plan.target import read_target

mesh = read_target("4xv5e:2x2").mesh(MeshOptions())
around = [(i, (i + 1) % 4) for i in range(4)]
kinds = {
    "all-reduce": lambda x: lax.psum(x, "data"),
    "all-gather": lambda x: lax.all_gather(x, "data", tiled=True),
    "reduce-scatter": lambda x: lax.psum_scatter(x, "data", tiled=True),
    "all-to-all": lambda x: lax.all_to_all(x, "data", 0, 0, tiled=True),
    "collective-permute": lambda x: lax.ppermute(x, "data", around),
    "within": lambda x: lax.all_gather(x, "fsdp", tiled=True),
    "everywhere": lambda x: lax.psum(x, ("data", "fsdp")),
    "loop": lambda x: lax.scan(lambda x, _: (lax.psum(jnp.tanh(x), "data"), None), x, None, 7)[0],
}
rows = P(("data", "fsdp"))
x = jax.ShapeDtypeStruct((16 * 64, 512), jnp.float32, sharding=NamedSharding(mesh, rows))
found = {}
for name, kind in kinds.items():
    step = jax.shard_map(kind, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    cost = program_cost(jax.jit(step).lower(x).compile().as_text(), 4, slices=4)
    found[name] = [cost.sent, cost.network]
print("FOUND", json.dumps(found))
"""


@needs_compiler
def test_collectives_over_slices_bring_what_the_algorithms_need():
    shown = run_with_compiler("-c", KINDS)
    found = json.loads(shown.split("FOUND ", 1)[1].splitlines()[0])
    others = 3 / 4
    assert found == {
        "all-reduce": [{}, {"all-reduce": 2 * PART * others}],
        "all-gather": [{}, {"all-gather": SLICES * PART * others}],
        "reduce-scatter": [{}, {"reduce-scatter": PART * others}],
        "all-to-all": [{}, {"all-to-all": PART * others}],
        "collective-permute": [{}, {"collective-permute": PART}],
        "within": [{"all-gather": CHIPS_EACH * PART * others}, {}],
        # Scattered in a slice, summed over slices by parts, and gathered in the slice.
        "everywhere": [
            {"reduce-scatter": PART * others, "all-gather": PART * others},
            {"all-reduce": 2 * PART / CHIPS_EACH * others},
        ],
        "loop": [{}, {"all-reduce": 7 * 2 * PART * others}],
    }


TEXT = """
ENTRY %main (x: bf16[256,8,128]) -> bf16[256,8,128] {
  %x = bf16[256,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %first = token[] after-all()
  %send = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%x, %first), SAID
  %recv = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%first), SAID
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %done = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, token[]) recv-done(%recv), channel_id=1
  ROOT %sum = bf16[256,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%done), index=0
}
"""
SAID = (
    'channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}'
)


@pytest.mark.parametrize(("slices", "share"), [(2, 1.0), (4, 1.5)])
def test_a_transfer_is_written_and_read_once_and_no_link_carries_it(slices, share):
    size = 2.0 * 256 * 8 * 128
    cost = program_cost(TEXT.replace("SAID", SAID), 4, slices=slices)
    assert cost.network == {"all-reduce": share * size}
    assert cost.sent == {}
    assert cost.hbm_bytes == 2 * size


@pytest.mark.parametrize(
    ("chips", "stride", "node"),
    [(16, 1, 8), (8, 2, 8), (4, 8, 8), (2, 8, 8), (8, 1, 8), (4, 4, 8), (16, 4, 8), (32, 1, 4)],
)
def test_a_node_fetches_what_it_lacks_once(chips, stride, node):
    """Against a count: every member of a group has a part, and members of a node share the fetching."""
    members = stride * np.arange(chips)
    own = members // node == members[0] // node
    lacking = np.count_nonzero(~own) / chips
    assert crossing(1.0, chips, stride, node) == pytest.approx(lacking / np.count_nonzero(own))


def gpu_plan(tmp_path, topology, **changes):
    file = tmp_path / "plan.json"
    values = tiny(tmp_path / "model", 16, **changes) | {"output_file": file, "topology": topology}
    assert main(["plan", *flags(values)]) == 0
    return json.loads(file.read_text())["plan"]


def test_hosts_of_gpus_pass_on_over_nvlink_what_the_network_brings(tmp_path):
    one = gpu_plan(tmp_path, "h100:8")
    assert one["step_per_chip"]["network"] == {}
    assert one["roofline_seconds"]["network"] == 0
    split = gpu_plan(tmp_path, "h100:16")["step_per_chip"]
    copies = gpu_plan(tmp_path, "h100:16", **{"mesh.data": 2})["step_per_chip"]
    # Of four passes over the parameters half comes from the other host, through eight adapters.
    passes = sum(split["sent"].values()) + sum(split["network"].values())
    assert sum(split["network"].values()) == pytest.approx(passes / (15 / 16) / 2 / 8)
    # Gradients of a copy are summed over the network: twice an eighth of the model, times 1/2.
    parameters = one["hbm_bytes_per_chip"]["parameters"]
    assert copies["network"] == {
        "gradients over data, once a step": pytest.approx(parameters, rel=0.01)
    }
    assert copies["sent"]["gradients over data, once a step"] == 0
    assert copies["sent"]["parameters and gradients"] == pytest.approx(
        one["step_per_chip"]["sent"]["parameters and gradients"]
    )


def test_parts_of_a_batch_sum_over_copies_once_which_the_output_says(tmp_path, capsys):
    """As little as a compiler can make of it; what is gathered and scattered is so for every part."""
    file, works = tmp_path / "plan.json", []
    values = big("qwen2.5-0.5b", 16, **{"mesh.data": 2, "mesh.fsdp": 4})
    for parts in (1, 2):
        given = {"trainer.gradient_accumulation_steps": parts, "output_file": file}
        assert main(["plan", *flags({**values, **given, "topology": "h100:8"})]) == 0
        works.append(json.loads(file.read_text())["plan"]["step_per_chip"])
    whole, parted = works
    summed, own = "gradients over data, once a step", "parameters and gradients"
    assert parted["sent"][summed] == whole["sent"][summed] > 0
    assert parted["sent"][own] == pytest.approx(2 * whole["sent"][own])
    assert capsys.readouterr().out.count(summed) == 2


def test_the_network_may_bound_a_step(tmp_path):
    plan = gpu_plan(tmp_path, "h100:16", **{"mesh.data": 16, "mesh.fsdp": 1})
    times, work = plan["roofline_seconds"], plan["step_per_chip"]
    assert times["network"] == sum(work["network"].values()) / CHIPS["h100"].network
    assert times["step"] == max(times[name] for name in ("compute", "interconnect", "network"))


@needs_compiler
@pytest.mark.slow
def test_a_second_slice_adds_the_sum_of_the_gradients(tmp_path):
    values = tiny(tmp_path / "model", 8, **{"optimizer.name": "adamw"})
    for name in ("alpha", "density", "delta_dtype"):
        del values[f"optimizer.{name}"]
    plan = planned(values, tmp_path, "2xv5e:2x2")["plan"]
    assert plan["slices"] == 2
    assert plan["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    held = plan["hbm_bytes_per_chip"]["parameters"]
    network = plan["step_per_chip"]["network"]
    # In bfloat16 at least, and what a sum in float32 or whole vectors would add at most.
    assert held <= network["all-reduce"] <= 2.2 * held
    assert plan["roofline_seconds"]["network"] == sum(network.values()) / CHIPS["v5e"].network


@needs_compiler
def test_a_state_that_does_not_fit_is_not_compiled(tmp_path):
    file = tmp_path / "plan.json"
    values = big("llama-3-8b", 4) | {"topology": "v5e:2x2", "output_file": file}
    shown = run_with_compiler("-m", "train", "plan", *flags(values))
    assert "16.1 GB are held from step to step; so nothing was compiled" in shown
    written = json.loads(file.read_text())
    hbm = written["plan"]["hbm_bytes_per_chip"]
    held = hbm["parameters"] + hbm["optimizer"] + hbm["delta"]
    assert held == pytest.approx(8 * 8_030_261_248 / 4, rel=2e-4)  # vectors are whole on every chip
    assert not written["plan"]["fits"]
    assert written["plan"]["source"] == "state"
    assert any("larger slice" in line for line in written["advice"])


@needs_compiler
def test_the_search_keeps_parameters_within_slices(tmp_path):
    """Of a model whose state fits nowhere, so that nothing is compiled."""
    file = tmp_path / "search.json"
    values = big("llama-3-8b", 32) | {"topology": "2xv5e:2x2", "output_file": file}
    run_with_compiler("-m", "train", "plan", *flags(values | {"search": "true"}))
    found = json.loads(file.read_text())["search"]
    meshes = {tuple(one["mesh"].values()) for one in found}
    assert meshes == {(2, 4, 1), (2, 2, 2), (2, 1, 4), (4, 2, 1)}
    assert {one["source"] for one in found} == {"state"}
