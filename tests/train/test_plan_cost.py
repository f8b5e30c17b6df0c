"""The walk through a compiled program, against XLA's own analysis and texts with known sums."""

import json

import jax
import jax.numpy as jnp
import pytest

from tests.virtual_devices import run_python
from train.plan.cost import group_size, program_cost
from train.plan.hlo import parse

LAYERS, WIDTH, ROWS = 7, 64, 32


def compiled_layers():
    """Matrix products in a loop over layers, and one after it."""

    def layers(x, weights):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return x @ weights[0]

    shapes = (ROWS, WIDTH), (LAYERS, WIDTH, WIDTH)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(layers).lower(*arguments).compile()


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    cost = program_cost(compiled_layers().as_text(), 1)
    assert cost.flops == 2 * ROWS * WIDTH * WIDTH * (LAYERS + 1)
    assert not cost.loops


def test_counted_once_it_is_what_xla_says():
    compiled = compiled_layers()
    once = program_cost(compiled.as_text(), 1, count_loops=False)
    found = compiled.cost_analysis()
    # XLA counts tanh and the counter too, one operation an element.
    assert once.flops == pytest.approx(found["flops"], rel=0.05)
    assert once.hbm_bytes == pytest.approx(found["bytes accessed"], rel=0.25)


def test_a_slice_of_the_stacked_layers_is_read_in_every_pass():
    """Every pass reads its layer alone: the whole stack at each would be seven times as much."""
    cost = program_cost(compiled_layers().as_text(), 1)
    layer, rows = 4 * WIDTH * WIDTH, 4 * ROWS * WIDTH
    # The layer is copied out and read; products and tanh read and write the rows.
    expected = LAYERS * (3 * layer + 4 * rows) + 3 * layer + 2 * rows
    assert cost.hbm_bytes == pytest.approx(expected, rel=0.05)


SHARDED = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from train.plan.cost import program_cost
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
def step(weights, x):
    def layer(x, part):
        x = jnp.tanh(x @ jax.lax.all_gather(part, "fsdp", tiled=True))
        x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        x = x + jax.lax.psum(x, ("data", "fsdp"))
        return x, jax.lax.psum_scatter(x.T @ x, "fsdp", tiled=True)
    return jax.lax.scan(layer, x, weights)
sharded = jax.shard_map(
    step, mesh=mesh, in_specs=(P(None, "fsdp"), P(("data", "fsdp"))),
    out_specs=(P(("data", "fsdp")), P(None, "fsdp")), check_vma=False)
shapes = (5, 64, 64), (16, 64)
arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
cost = program_cost(jax.jit(sharded).lower(*arguments).compile().as_text(), 8)
print(json.dumps([cost.sent, cost.flops]))
"""


def test_collectives_in_a_loop_bring_what_the_algorithms_need():
    sent, flops = json.loads(run_python("-c", SHARDED, devices=8, timeout=120))
    matrix, rows = 4 * 64 * 64, 4 * 2 * 64
    assert sent == {
        "all-gather": 5 * matrix * 3 / 4,
        "collective-permute": 5 * rows,
        "all-reduce": 5 * 2 * rows * 7 / 8,
        "reduce-scatter": 5 * matrix * 3 / 4,
    }
    assert flops == 5 * 2 * (2 * 2 * 64 * 64)


TPU_TEXT = """
%body (p: (u32[], bf16[4,8], bf16[16,8])) -> (u32[], bf16[4,8], bf16[16,8]) {
  %p = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %w = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %x = bf16[16,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=2
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}, u32[]) fusion(%w), kind=kCustom, calls=%begin
  %part = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%start), index=0
  %on = (bf16[16,16]{1,0:T(8,128)S(1)}, bf16[4,8]{1,0}) fusion(%part, %x), kind=kOutput, calls=%go_on
  ROOT %out = (u32[], bf16[4,8]{1,0}, bf16[16,8]{1,0:S(1)}) tuple(%next, %w, %x)
}

%condition (p: (u32[], bf16[4,8], bf16[16,8])) -> pred[] {
  %p = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %eight = u32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i, %eight), direction=LT
}

%begin (w: bf16[4,8]) -> (bf16[4,8], bf16[16,8], u32[]) {
  %w = bf16[4,8]{1,0} parameter(0)
  %gather = bf16[16,8]{1,0} all-gather(%w), CHAINED
  ROOT %call = (bf16[4,8]{1,0}, u32[]) custom-call(%gather), target="AsyncCollectiveStart"
}

%go_on (w: bf16[4,8], x: bf16[16,8]) -> (bf16[16,16], bf16[4,8]) {
  %w = bf16[4,8]{1,0} parameter(0)
  %x = bf16[16,8]{1,0:S(1)} parameter(1)
  %gather = bf16[16,8]{1,0} all-gather(%w), CHAINED
  %product = bf16[16,16]{1,0:S(1)} convolution(%x, %x), dim_labels=bf_oi->bf
  ROOT %both = (bf16[16,16]{1,0:S(1)}, bf16[4,8]{1,0}) tuple(%product, %w)
}

ENTRY %main (w: bf16[4,8], x: bf16[16,8]) -> bf16[16,8] {
  %w = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[16,8]{1,0:T(8,128)S(1)} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %first = (u32[], bf16[4,8]{1,0}, bf16[16,8]{1,0:S(1)}) tuple(%zero, %w, %x)
  %loop = (u32[], bf16[4,8]{1,0}, bf16[16,8]{1,0:S(1)}) while(%first), condition=%condition, body=%body
  ROOT %last = bf16[16,8]{1,0:S(1)} get-tuple-element(%loop), index=2
}
"""
CHAINED = "channel_id=5, replica_groups=mesh['a'=4,'b'=2] {'a'}, attributes={chain_id=\"0\"}"
TPU_TEXT = TPU_TEXT.replace("CHAINED", CHAINED)


def test_a_tpu_program_with_a_gather_spread_over_fusions():
    """The gather is started once in each of the four passes, however many fusions name it."""
    cost = program_cost(TPU_TEXT, 8)
    assert cost.sent == {"all-gather": 4 * (2 * 16 * 8) * 3 / 4}
    assert cost.flops == 4 * 2 * 16 * 16 * 8
    assert not cost.loops


# As XLA's own parser accepts and prints it: operands, results, and what a permutation keeps besides.
COMBINED_TEXT = """
ENTRY %main (a: bf16[4,8], b: f32[2,16]) -> (bf16[32,8], f32[16,16]) {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[2,16]{1,0} parameter(1)
  %gather = ((bf16[4,8]{1,0}, f32[2,16]{1,0}), (bf16[32,8]{1,0}, f32[16,16]{1,0})) all-gather-start(%a, %b), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}, use_global_device_ids=true
  %permute = ((bf16[4,8]{1,0}, f32[2,16]{1,0}), (bf16[4,8]{1,0}, f32[2,16]{1,0}), u32[], u32[]) collective-permute-start(%a, %b), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %permuted = (bf16[4,8]{1,0}, f32[2,16]{1,0}) collective-permute-done(%permute)
  ROOT %gathered = (bf16[32,8]{1,0}, f32[16,16]{1,0}) all-gather-done(%gather)
}
"""  # noqa: E501


def test_a_collective_of_several_arrays_brings_all_of_them():
    cost = program_cost(COMBINED_TEXT, 8)
    arrays = 2 * 4 * 8 + 4 * 2 * 16
    assert cost.sent == {"all-gather": 8 * arrays * 7 / 8, "collective-permute": arrays}
    assert cost.hbm_bytes == 2 * (8 * arrays + arrays)


def test_an_unreadable_loop_counts_once_and_is_named():
    text = TPU_TEXT.replace("direction=LT", "direction=NE")
    cost = program_cost(text, 8)
    assert cost.loops == ("loop",)
    assert cost.flops == 2 * 16 * 16 * 8


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", 2),
        ("replica_groups={}", 8),
    ],
)
def test_groups_in_every_notation(groups, size):
    assert group_size(f"channel_id=1, {groups}, dimensions={{0}}", 8) == size


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule empty\n")
