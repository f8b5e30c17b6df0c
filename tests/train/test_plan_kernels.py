"""What splash attention computes and moves by `plan`, against the kernel's own tables and XLA's."""

import json

import pytest

from tests.train.builders import needs_compiler, run_with_compiler
from train.plan.cost import program_cost

HEADS, KV_HEADS, LENGTH, WIDTH = 8, 2, 1536, 128

COUNT = """
import json, os, sys
os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1",
                  TPU_ACCELERATOR_TYPE="v5p-8", TPU_WORKER_HOSTNAMES="localhost")
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from train.models.splash import splash_attention
from train.plan.cost import program_cost

heads, kv_heads, length, width = json.loads(sys.argv[1])
chips = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
kinds = (AxisType.Auto,) * 3
mesh = Mesh(np.array(chips).reshape(1, 4, 1), ("data", "fsdp", "tensor"), axis_types=kinds)
place = NamedSharding(mesh, P("fsdp"))
def shape(heads):
    return jax.ShapeDtypeStruct((4, length, heads, width), jnp.bfloat16, sharding=place)
def splash(q, k, v):
    return splash_attention(q, k, v, None)
def xla(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)
found = {}
for attend in (splash, xla):
    def loss(q, k, v):
        def layer(q, _):
            return attend(q, k, v), None
        return jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape(heads), shape(kv_heads), shape(kv_heads))
        found[attend.__name__] = program_cost(step.compile().as_text(), 4).flops
causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
blocks = kernels.BlockSizes(512, 512, 512, 512, 512, 512, 512, 512)
kernel = kernels.make_splash_mha(causal, block_sizes=blocks, head_shards=1, q_seq_shards=1)
visited = int(np.count_nonzero(kernel.fwd_mask_info.block_mask))
print("FOUND", json.dumps({**found, "visited": visited}))
"""


@needs_compiler
def test_products_are_those_of_the_blocks_that_the_kernel_visits():
    out = run_with_compiler("-c", COUNT, json.dumps([HEADS, KV_HEADS, LENGTH, WIDTH]))
    found = json.loads(out.split("FOUND ", 1)[1])
    product = 2 * HEADS * LENGTH**2 * WIDTH
    # Two products forward and four backward over all pairs of tokens, in each of three layers.
    assert found["xla"] == pytest.approx(3 * 6 * product, rel=0.01)
    share = found["visited"] * 512**2 / LENGTH**2
    assert share == 6 / 9
    # The kernels make two, four and three of the blocks that they visit.
    assert found["splash"] == pytest.approx(3 * 9 * share * product, rel=0.01)


TEXT = """
%body (p: (s32[], bf16[2,4,1024,128])) -> (s32[], bf16[2,4,1024,128]) {
  %p = (s32[], bf16[2,4,1024,128]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %q = bf16[2,4,1024,128]{3,2,1,0} get-tuple-element(%p), index=1
  %table = s8[1,4,4]{2,1,0:S(1)} constant({...})
  %k = bf16[2,2,1024,128]{3,2,1,0} broadcast(%i), dimensions={}
  %kernel.1 = KERNEL
"xprof_metadata":"{BLOCKS}"
}}, metadata={op_name="jit(f)/splash_mha_PHASE_no_residuals/pallas_call"}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[2,4,1024,128]{3,2,1,0}) tuple(%next, %q)
}

%condition (p: (s32[], bf16[2,4,1024,128])) -> pred[] {
  %p = (s32[], bf16[2,4,1024,128]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

ENTRY %main (q: bf16[2,4,1024,128]) -> bf16[2,4,1024,128] {
  %q = bf16[2,4,1024,128]{3,2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[2,4,1024,128]{3,2,1,0}) tuple(%zero, %q)
  %loop = (s32[], bf16[2,4,1024,128]{3,2,1,0}) while(%first), condition=%condition, body=%body
  ROOT %last = bf16[2,4,1024,128]{3,2,1,0} get-tuple-element(%loop), index=1
}
"""
BLOCKS = {"block_q": 256, "block_kv": 256, "block_q_dkv": 256, "block_kv_dkv": 512}
TEXT = TEXT.replace("{BLOCKS}", json.dumps(BLOCKS).replace('"', '\\"'))
FORWARD = (
    "bf16[2,4,1024,128]{3,2,1,0} custom-call(%table, %table, %q, %k, %k), "
    'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={'
)
BACKWARD = (
    "(bf16[2,2,1024,128]{3,2,1,0}, bf16[2,2,1024,128]{3,2,1,0:S(1)}) "
    "custom-call(%table, %table, %q, %k, %k, %q), "
    'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={'
)
QUERY, KEY = 2 * 2 * 4 * 1024 * 128, 2 * 2 * 2 * 1024 * 128


def cost_of(kernel, phase):
    return program_cost(TEXT.replace("KERNEL", kernel).replace("PHASE", phase), 1)


def test_a_forward_kernel_fetches_keys_for_every_block_of_queries():
    """Ten of sixteen blocks of 256 x 256, of eight heads of two rows, in five passes."""
    cost = cost_of(FORWARD, "fwd")
    assert not cost.loops
    assert not cost.kernels
    assert cost.flops == 5 * 2 * (2 * 8 * 10 * 256 * 256 * 128)
    # Queries and result once; keys and values by each of two heads, 2.5 times.
    plain = cost_of("bf16[2,4,1024,128]{3,2,1,0} iota()", "fwd").hbm_bytes
    assert cost.hbm_bytes - plain == 5 * (2 * QUERY + 2 * 2 * 2.5 * KEY)


def test_a_backward_kernel_fetches_queries_for_every_block_of_keys():
    """Six of eight blocks of 256 x 512."""
    cost = cost_of(BACKWARD, "dkv")
    assert cost.flops == 5 * 4 * (2 * 8 * 6 * 256 * 512 * 128)
    plain = cost_of("bf16[2,4,1024,128]{3,2,1,0} iota()", "dkv").hbm_bytes
    # Keys, values and one gradient once (the other stays in a cache); what queries bring 1.5 times.
    assert cost.hbm_bytes - plain == 5 * (3 * KEY + 2 * 1.5 * QUERY)


def test_an_unknown_kernel_is_named():
    cost = cost_of(
        FORWARD.replace("bf16[2,4,1024,128]{3,2,1,0} custom", "bf16[8]{0} custom"), "other"
    )
    assert cost.kernels == ("kernel.1",)
    assert cost.flops == 0
