from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from train.data.padding import pad_rows
from train.models import Decoder, ModelConfig
from train.objectives.logps import (
    AUTO_VOCAB_CHUNK,
    completion_statistics,
    token_statistics,
)

COLUMNS = ("prompt_tokens", "prompt_mask", "completion_tokens", "completion_mask")


def draw(vocabulary, *, scale=1.0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    scale = scale / 4  # logits of unit variance
    hidden = (scale * jax.random.normal(keys[0], (3, 5, 16))).astype(dtype)
    unembedding = jax.random.normal(keys[1], (16, vocabulary)).astype(dtype)
    targets = jax.random.randint(keys[2], (3, 5), 0, vocabulary)
    # The borders of the vocabulary, and of the overlap of the last two chunks, must be right.
    targets = targets.at[0, :4].set(jnp.array([0, vocabulary - 1, 7, vocabulary - 7]))
    return hidden, unembedding, targets


def exact(hidden, unembedding, targets):
    """The definition, in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)
    every = log_softmax(logits, axis=-1)
    picked = np.take_along_axis(every, np.asarray(targets)[..., None], axis=-1)[..., 0]
    return picked, logits.argmax(-1) == np.asarray(targets)


@pytest.mark.parametrize("vocab_chunk", [None, 1, 7, 100, 250, 999, 1000, 5000])
def test_matches_float64(vocab_chunk):
    hidden, unembedding, targets = draw(1000)
    targets = targets.at[1].set(jnp.argmax(hidden[1] @ unembedding, axis=-1))
    logps, top1, _ = token_statistics(hidden, unembedding, targets, vocab_chunk=vocab_chunk)
    expected, expected_top1 = exact(hidden, unembedding, targets)
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(top1, expected_top1)
    assert top1[1].all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("vocab_chunk", [7, 250, 999])
def test_chunked_gradients_are_the_plain_ones(vocab_chunk, dtype):
    hidden, unembedding, targets = draw(1000, dtype=dtype)
    weights = jax.random.normal(jax.random.key(1), targets.shape)

    def gradients(chunk):
        def total(hidden, unembedding):
            logps = token_statistics(hidden, unembedding, targets, vocab_chunk=chunk).logps
            return jnp.sum(weights * logps)

        return jax.grad(total, argnums=(0, 1))(hidden, unembedding)

    tolerance = 3e-6 if dtype == jnp.float32 else 2e-2
    for chunked, plain in zip(gradients(vocab_chunk), gradients(None), strict=True):
        assert chunked.dtype == plain.dtype == dtype
        chunked, plain = np.asarray(chunked, np.float32), np.asarray(plain, np.float32)
        np.testing.assert_allclose(chunked, plain, atol=tolerance * np.abs(plain).max())


@pytest.mark.parametrize("vocab_chunk", [None, 64])
def test_large_logits_stay_finite(vocab_chunk):
    hidden, unembedding, targets = draw(200, scale=1e4)

    def total(hidden):
        return jnp.sum(
            token_statistics(hidden, unembedding, targets, vocab_chunk=vocab_chunk).logps
        )

    value, gradient = jax.value_and_grad(total)(hidden)
    np.testing.assert_allclose(value, exact(hidden, unembedding, targets)[0].sum(), rtol=1e-5)
    assert jnp.isfinite(gradient).all()


def temp_bytes(vocabulary, length, vocab_chunk):
    """What the compiler sets aside for the gradient, beside arguments and results."""

    def total(hidden, unembedding, targets):
        return jnp.sum(
            token_statistics(hidden, unembedding, targets, vocab_chunk=vocab_chunk).logps
        )

    shapes = (
        jax.ShapeDtypeStruct((8, length, 32), jnp.float32),
        jax.ShapeDtypeStruct((32, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((8, length), jnp.int32),
    )
    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_chunked_memory_does_not_grow_with_the_vocabulary():
    logits_bytes = 8 * 64 * 64_000 * 4
    assert temp_bytes(64_000, 64, None) >= logits_bytes
    small, large = temp_bytes(8_000, 64, 1_000), temp_bytes(64_000, 64, 1_000)
    assert large <= 1.01 * small
    assert large < logits_bytes / 10
    # A few arrays of [batch, length, chunk] are all there is.
    assert large < 6 * 8 * 64 * 1_000 * 4


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        }
    )
    return Decoder(config, nnx.Rngs(0))


@pytest.fixture(scope="module")
def rows(model):
    """Two rows of different lengths, and the log-probabilities of each without any padding."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 97, n) for n in (1, 6)]
    answers = [rng.integers(0, 97, n) for n in (5, 3)]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = jnp.asarray(np.concatenate([prompt, answer])[None], jnp.int32)
        every = log_softmax(np.asarray(model(whole)[0], np.float64), axis=-1)
        expected.append([every[len(prompt) - 1 + i, token] for i, token in enumerate(answer)])
    prompt_columns = pad_rows([prompt.tolist() for prompt in prompts], 8, 11, left=True)
    answer_columns = pad_rows([answer.tolist() for answer in answers], 8, 11)
    return [jnp.asarray(column) for column in (*prompt_columns, *answer_columns)], expected


@pytest.mark.parametrize("vocab_chunk", [None, 40])
def test_completions_are_scored_as_without_padding(model, rows, vocab_chunk):
    columns, expected = rows
    batch = dict(zip(COLUMNS, columns, strict=True))
    logps, top1, _ = completion_statistics(model, batch, vocab_chunk=vocab_chunk)
    assert logps.shape == top1.shape == (2, 8)
    for row, values in enumerate(expected):
        np.testing.assert_allclose(logps[row, : len(values)], values, atol=2e-6)
        assert not np.asarray(logps[row, len(values) :]).any()
    assert not np.asarray(top1)[~np.asarray(columns[3])].any()


def test_bad_arguments_are_named():
    hidden, unembedding, targets = draw(50)
    with pytest.raises(ValueError, match=r"do not fit together: \(3, 5, 16\), \(50, 16\)"):
        token_statistics(hidden, unembedding.T, targets)
    with pytest.raises(ValueError, match="vocab_chunk must be a positive number or None, got 0"):
        token_statistics(hidden, unembedding, targets, vocab_chunk=0)
    empty = jnp.zeros((1, 0), jnp.int32)
    batch = dict(zip(COLUMNS, [empty, empty > 0] * 2, strict=True))
    with pytest.raises(ValueError, match="at least one position"):
        completion_statistics(None, batch)  # type: ignore


def _temporary_bytes(vocabulary, length, vocab_chunk):
    """What the compiler sets aside for the log-probabilities and their gradients."""

    def total(hidden, unembedding, targets):
        return jnp.sum(
            token_statistics(hidden, unembedding, targets, vocab_chunk=vocab_chunk).logps
        )

    shapes = [
        jax.ShapeDtypeStruct((1, length, 256), jnp.float32),
        jax.ShapeDtypeStruct((256, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    ]
    lowered = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*shapes)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_of_chunks_does_not_grow_with_the_vocabulary():
    vocabulary, length, chunk = 151_936, 2048, AUTO_VOCAB_CHUNK
    chunked = _temporary_bytes(vocabulary, length, chunk)
    assert chunked < _temporary_bytes(vocabulary, length, None) / 10
    assert _temporary_bytes(2 * vocabulary, length, chunk) == pytest.approx(chunked, rel=0.01)
    # Half the length takes half as much, so the bound is length times chunk.
    assert _temporary_bytes(vocabulary, length // 2, chunk) < 0.6 * chunked
    assert chunked < 3 * 4 * length * chunk


@pytest.mark.parametrize("vocab_chunk", [None, 7, 999])
def test_entropy_is_that_of_the_tempered_distribution(vocab_chunk):
    hidden, unembedding, _ = draw(1000, scale=3.0)

    class Fixed:  # two tokens of prompt, whose last one predicts the first of four
        def hidden(self, tokens, mask):
            return jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))

        def unembedding(self):
            return unembedding

    prompt, completion = jnp.ones((3, 2), jnp.int32), jnp.full((3, 4), 11)
    mask = jnp.arange(4) < jnp.array([[4], [2], [0]])
    columns = (prompt, prompt > 0, completion, mask)
    batch = dict(zip(COLUMNS, columns, strict=True))
    model: Any = Fixed()
    logps, _, entropy = completion_statistics(
        model, batch, temperature=0.7, vocab_chunk=vocab_chunk
    )
    every = log_softmax(np.asarray(hidden, np.float64) @ unembedding / 0.7, axis=-1)[:, :4]
    np.testing.assert_allclose(logps, np.where(mask, every[..., 11], 0), rtol=2e-6, atol=1e-6)
    expected = np.where(mask, -(np.exp(every) * every).sum(axis=-1), 0)
    np.testing.assert_allclose(entropy, expected, rtol=1e-5, atol=1e-6)
