"""Logits of random tiny models next to transformers' own, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.tiny_models import (
    CASES,
    decoder_logits,
    padded_batch,
    save_model,
    transformers_logits,
)
from train.models import from_hf

WIDTH = 24
PADDING = {
    "none": [(0, 24), (0, 24), (0, 24)],
    "left": [(0, 24), (5, 24), (23, 24)],
    "right": [(0, 24), (0, 19), (0, 1)],
    "both": [(3, 20), (0, 9), (20, 24)],  # a left-padded prompt with a right-padded completion
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name, tmp_path):
    theirs = save_model(name, tmp_path)
    ours = from_hf(tmp_path)
    for kind, rows in PADDING.items():
        tokens, mask = padded_batch(rows, WIDTH, seed=len(kind))
        expected = transformers_logits(theirs, tokens, mask)
        found = decoder_logits(ours, tokens, mask)
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        assert np.abs(expected[mask]).max() > 1.0  # else the bound below would say little
        assert np.abs(found - expected)[mask].max() <= 1e-5, kind


def test_float32_is_as_close_to_float64_as_torch_is(tmp_path):
    theirs = save_model("llama3-rope-scaling", tmp_path)
    tokens, mask = padded_batch([(0, 64), (10, 64)], 64)
    ours = decoder_logits(from_hf(tmp_path), tokens, mask)
    single = transformers_logits(theirs, tokens, mask)
    double = transformers_logits(theirs.double(), tokens, mask)
    torch_error = np.abs(single - double)[mask].max()
    # Products of float32 cut to bfloat16 or TF32 would be 100 times further away.
    assert np.abs(ours - double)[mask].max() <= 4 * torch_error + 1e-7


def test_without_a_mask_every_token_is_real(tmp_path):
    save_model("qwen2-tied", tmp_path)
    model = from_hf(tmp_path)
    tokens, mask = padded_batch([(0, 9)], 9)
    np.testing.assert_allclose(model(tokens), model(tokens, mask), rtol=0, atol=1e-6)


def test_given_positions_are_used(tmp_path):
    save_model("llama-gqa-theta1e4", tmp_path)
    model = from_hf(tmp_path)
    tokens, _ = padded_batch([(0, 9)], 9)
    forward = jax.jit(lambda positions: model(tokens, positions=positions))
    counted = jnp.arange(9)[None]
    default = model(tokens)
    np.testing.assert_allclose(forward(counted), default, rtol=0, atol=1e-6)
    # Rotary attention sees differences of positions only ...
    np.testing.assert_allclose(forward(counted + 50), default, rtol=0, atol=1e-5)
    # ... and does see those.
    assert np.abs(forward(2 * counted) - default).max() > 1e-2


@pytest.mark.parametrize("name", ["llama-gqa-theta5e5", "qwen3"])
def test_bfloat16_compute_stays_near_float32(name, tmp_path):
    save_model(name, tmp_path)
    tokens, mask = padded_batch(PADDING["both"], WIDTH)
    wide = decoder_logits(from_hf(tmp_path), tokens, mask)[mask]
    model = from_hf(tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    logits = decoder_logits(model, tokens, mask)
    assert logits.dtype == np.float32
    hidden = jax.eval_shape(model.hidden, tokens, mask)
    assert hidden.dtype == model.unembedding().dtype == jnp.bfloat16
    assert model.embed_tokens[...].dtype == jnp.float32
    error = logits[mask] - wide
    assert 1e-5 < np.sqrt((error**2).mean()) < 0.03 * wide.std()
