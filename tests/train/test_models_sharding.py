import jax
import pytest
from jax.sharding import AxisType

from tests.train.tiny_models import save_model
from tests.virtual_devices import run_python
from train.models import ModelConfig, from_hf, param_shardings

# Eight virtual devices have to be asked for before jax starts, so this runs in its own process.
PROGRAM = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from train.generation.sampler import make_greedy
from train.models import from_hf, merge_model, split_model, to_hf

directory, exports = sys.argv[1], Path(sys.argv[2])
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
tokens = rng.integers(3, 96, (8, 10), dtype=np.int32)
mask = np.arange(10) >= rng.integers(0, 9, (8, 1))
graphdef, params = split_model(from_hf(directory))
_, split = split_model(from_hf(directory, mesh=mesh))

kernel = split["layers"]["self_attn"]["q_proj"]["kernel"]
assert kernel.sharding == NamedSharding(mesh, P(None, "fsdp", "tensor")), kernel.sharding
assert kernel.addressable_shards[0].data.shape == (3, 12, 24)
assert split["layers"]["mlp"]["down_proj"]["kernel"].sharding.spec == P(None, "tensor", "fsdp")
assert split["embed_tokens"].sharding.spec == P("tensor", "fsdp")
assert split["layers"]["self_attn"]["q_proj"]["bias"].sharding.spec == P(None, "tensor")
assert split["norm"]["weight"].sharding.is_fully_replicated
jax.tree.map(np.testing.assert_array_equal, params, split)
for name, weights in (("single", params), ("split", split)):
    to_hf(merge_model(graphdef, weights), exports / name, like=directory)
files = [(exports / name / "model.safetensors").read_bytes() for name in ("single", "split")]
assert files[0] == files[1]

forward = jax.jit(lambda p, t, m: merge_model(graphdef, p)(t, m))
generate = make_greedy(graphdef, max_new_tokens=4, eos_id=2, pad_id=0)
with jax.set_mesh(mesh):
    rows = jax.device_put((tokens, mask), NamedSharding(mesh, P("fsdp")))
    logits, text = forward(split, *rows), generate(split, *rows)
single = forward(params, tokens, mask)
assert len(logits.sharding.device_set) == 8
error = np.abs(np.asarray(logits) - np.asarray(single))[mask].max()
assert error < 1e-5, error
np.testing.assert_array_equal(text, generate(params, tokens, mask))
print("same on 8 devices")
"""


@pytest.mark.slow
def test_sharded_model_computes_the_same(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    save_model("qwen2-tied", directory)
    shown = run_python("-c", PROGRAM, str(directory), str(tmp_path), devices=8)
    assert "same on 8 devices" in shown


def test_axes_that_the_mesh_lacks_or_cannot_split_stay_whole():
    config = ModelConfig("llama", 97, 48, 80, 3, 6, 2, 8)

    def specs(shape, names):
        devices = jax.sharding.AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
        tree = param_shardings(config, devices)
        return tuple(tree["embed_tokens"].spec), tuple(tree["lm_head"].spec)

    assert specs((2, 2), ("fsdp", "tensor")) == ((None, "fsdp"), ("fsdp", None))  # 97 is odd
    assert specs((5, 97), ("fsdp", "tensor")) == (("tensor", None), (None, "tensor"))
    assert specs((2,), ("data",)) == ((None, None), (None, None))


def test_meshes_with_explicit_axes_are_refused(tmp_path):
    save_model("llama-gqa-theta1e4", tmp_path)
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"axis types .*Explicit.*; make it with jax.make_mesh"):
        from_hf(tmp_path, mesh=mesh)
