"""Which program computes attention, and that they compute the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.train.tiny_runs import make_model_dir
from train.config import ModelOptions, UserError
from train.inputs.model import check_model
from train.models import Decoder, ModelConfig, merge_model, split_model
from train.models.attention import AttentionInputs, attend, check_attention
from train.models.splash import splash_attention
from train.objectives.pair_logps import attention_of_parts

CONFIG = ModelConfig("qwen2", 97, 64, 96, 2, 4, 2, 16, qkv_bias=True)
HALF = dataclasses.replace(CONFIG, dtype=jnp.bfloat16, attention="cudnn")


def test_default_runs_anywhere():
    assert CONFIG.attention == "xla"
    check_attention(CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": jnp.float32}, "needs dtype bfloat16, not float32"),
        ({"head_dim": 256}, r"heads of 8, 16, … 128 entries, not 256"),
        ({"head_dim": 12}, r"not 12; use xla"),
    ],
)
def test_what_cudnn_does_not_compute_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_attention(dataclasses.replace(HALF, **changes))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_cudnn_without_a_gpu_is_refused_and_names_the_field(tmp_path):
    path = make_model_dir(tmp_path)
    options = ModelOptions(path=str(path), dtype="bfloat16", attention="cudnn")
    message = "model: attention is cudnn, which needs an NVIDIA GPU, and JAX runs on cpu; use xla"
    with pytest.raises(UserError, match=message):
        check_model(options)


def _layouts():
    mask = np.arange(32) >= np.array([[0], [5], [20]])
    parts = np.array([[0] * 10 + [1] * 12 + [2] * 10, [0] * 20 + [1] * 6 + [2] * 6, [0] * 32])
    positions, visible = attention_of_parts(jnp.asarray(parts))
    return {
        "full rows": {},
        "padding": {"mask": mask},
        "shared prompts": {"positions": positions, "visible": visible},
    }


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")
@pytest.mark.parametrize("layout", list(_layouts()))
def test_cudnn_is_as_near_to_float32_as_xla_is(layout):
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 32))
    inputs = _layouts()[layout]
    params = split_model(Decoder(CONFIG, nnx.Rngs(0)))[1]

    def gradient(config):
        graphdef = split_model(Decoder(config, nnx.Rngs(0)))[0]

        def loss(params):
            hidden = merge_model(graphdef, params).hidden(tokens, **inputs)
            kept = inputs.get("mask", np.ones(tokens.shape, bool))
            return jnp.sum(jnp.where(kept[..., None], jnp.sin(hidden.astype(jnp.float32)), 0))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    with jax.default_matmul_precision("highest"):
        exact = gradient(CONFIG)
    xla, cudnn = (gradient(dataclasses.replace(HALF, attention=kind)) for kind in ("xla", "cudnn"))

    # Of the gradient as a whole: that of a key's bias is 0 but for rounding.
    def error(found):
        apart = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(found, exact, strict=True))
        return (apart / sum(float(jnp.sum(b**2)) for b in exact)) ** 0.5

    assert error(cudnn) <= 2 * error(xla) < 0.1


# Splash attention, whose kernel is interpreted here


def _arrays(length, heads=4, kv_heads=2, dim=16):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(4, length, count, dim) for count in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def _splash_gradient(arrays, segments, kept):
    def loss(arrays):
        out = splash_attention(*arrays, segments, interpret=True)
        return jnp.sum(jnp.sin(out) * kept), out

    return jax.grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize(
    ("length", "rows"),
    [
        pytest.param(128, "whole", marks=pytest.mark.slow),
        pytest.param(150, "padded", marks=pytest.mark.slow),
        (150, "packed"),
    ],
)
def test_splash_attention_is_attention(length, rows):
    arrays, places = _arrays(length), np.arange(length)
    # Padding before, behind and in the middle, as between a prompt and an answer.
    padded = [places >= 9, places < 100, (places < 40) | (places >= 70), places >= 0]
    # Examples one after the other, and padding behind them.
    packed = [places // 50, places // 150, places // 149, np.where(places < 90, places // 20, -1)]
    segments = {"whole": None, "padded": padded, "packed": packed}[rows]
    keys, kept = None, 1.0
    if segments is not None:
        segments = jnp.asarray(np.stack(segments), jnp.int32)
        keys = segments[:, None, :, None] == segments[:, None, None, :]
        kept = (segments != (0 if rows == "padded" else -1))[..., None, None]

    def loss(arrays):
        inputs = AttentionInputs(arrays[0], arrays[0], keys, causal=True)
        out = attend(CONFIG, *arrays, inputs, cached=False)
        return jnp.sum(jnp.sin(out) * kept), out

    wanted, out = jax.grad(loss, has_aux=True)(arrays)
    found, splashed = _splash_gradient(arrays, segments, kept)
    np.testing.assert_allclose(splashed * kept, out * kept, atol=2e-6)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_splash_refuses_rows_with_a_shared_part():
    config = dataclasses.replace(CONFIG, attention="splash")
    arrays = _arrays(16)
    inputs = AttentionInputs(arrays[0], arrays[0], jnp.ones((4, 1, 16, 16), bool), causal=False)
    with pytest.raises(ValueError, match="have a part in common"):
        attend(config, *arrays, inputs, cached=False)


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attention is 'flash'; supported are xla, cudnn, splash"):
        check_attention(dataclasses.replace(CONFIG, attention="flash"))
