import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train.models import Decoder, ModelConfig, layer_axes, merge_model, split_model
from train.models.decoder import REMAT_POLICIES

CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qkv_bias=True,
    qk_norm=True,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (3, 10)), jnp.int32)
# The middle row has no real token at all, the last is padded on both sides.
MASK = jnp.asarray([[True] * 10, [False] * 10, [False] * 3 + [True] * 4 + [False] * 3])


@pytest.fixture(scope="module")
def split():
    return fresh(CONFIG)


def abstract(config):
    return split_model(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


def fresh(config):
    """Like a fresh model; drawn with NumPy, since compiling JAX's generator takes seconds."""
    rng = np.random.default_rng(0)
    graphdef, shapes = abstract(config)

    def draw(path, leaf):
        is_norm = path[-1].key == "weight"
        return jnp.asarray(is_norm + 0.02 * rng.normal(size=leaf.shape), jnp.float32)

    return graphdef, jax.tree.map_with_path(draw, shapes)


@jax.jit(static_argnums=0)
def forward(graphdef, params, tokens=TOKENS, mask=None):
    return merge_model(graphdef, params)(tokens, mask)


def loss(graphdef, params):
    logits = merge_model(graphdef, params)(TOKENS, MASK)
    token_loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:])
    counted = MASK[:, :-1] & MASK[:, 1:]
    return jnp.sum(token_loss * counted) / jnp.sum(counted)


@jax.jit(static_argnums=0)
def loss_and_gradient(graphdef, params):
    return jax.value_and_grad(lambda p: loss(graphdef, p))(params)


def test_fresh_parameters_are_drawn_as_transformers_draws_them():
    config = dataclasses.replace(CONFIG, hidden_size=128, vocab_size=512, initializer_range=0.05)
    params = jax.jit(lambda: split_model(Decoder(config, nnx.Rngs(1)))[1])()
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            assert (leaf == 1).all(), name
        elif "bias" in name:
            assert (leaf == 0).all(), name
        else:
            assert abs(float(leaf.std()) / 0.05 - 1) < 0.05, name
            assert abs(float(leaf.mean())) < 5 * 0.05 / math.sqrt(leaf.size), name
    # Every layer has its own draw.
    kernel = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"])
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.05


def test_model_starts_uniform_and_learns_from_scratch(split):
    graphdef, params = split
    first, _ = loss_and_gradient(graphdef, params)
    assert abs(float(first) - math.log(40)) < 0.1
    for _ in range(40):
        _, gradient = loss_and_gradient(graphdef, params)
        params = jax.tree.map(lambda p, g: p - 0.005 * jnp.sign(g), params, gradient)
    last, _ = loss_and_gradient(graphdef, params)
    assert float(last) < 0.3


def test_params_are_plain_and_merge_inside_jit(split):
    graphdef, params = split
    assert type(params) is dict
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    inside = forward(graphdef, params, TOKENS, MASK)
    np.testing.assert_allclose(inside, merge_model(graphdef, params)(TOKENS, MASK), atol=1e-6)
    again = split_model(merge_model(graphdef, params))[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_layer_axes_mark_exactly_the_stacked_leaves(split):
    for path, leaf in jax.tree.leaves_with_path(split[1]):
        names = tuple(part.key for part in path)
        stacked = layer_axes(names)
        assert stacked == (1 if names[0] == "layers" else 0)
        if stacked:
            assert leaf.shape[0] == CONFIG.num_layers
        else:
            assert names[0] in ("embed_tokens", "lm_head", "norm")


def test_constructs_and_runs_on_shapes_alone():
    huge = dataclasses.replace(
        CONFIG, vocab_size=151_936, hidden_size=8192, intermediate_size=28_672, num_layers=80
    )
    graphdef, params = abstract(huge)
    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    out = jax.eval_shape(lambda p, t: merge_model(graphdef, p).hidden(t), params, tokens)
    assert out.shape == (4, 16, 8192)


def test_compiled_program_does_not_grow_with_depth():
    def lines(layers):
        config = dataclasses.replace(CONFIG, num_layers=layers)
        return len(forward.lower(*abstract(config)).as_text().splitlines())

    assert lines(12) == lines(2)


def test_padding_gives_no_nan_and_no_gradient(split):
    graphdef, params = split
    assert jnp.isfinite(forward(graphdef, params, TOKENS, MASK)).all()
    _, grads = loss_and_gradient(graphdef, params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    # Tokens under the mask reach neither loss nor gradient.
    real = np.unique(TOKENS[MASK])
    embedding = np.asarray(grads["embed_tokens"])
    hidden_only = np.setdiff1d(np.arange(40), real)
    assert hidden_only.size
    assert (embedding[hidden_only] == 0).all()
    assert (np.abs(embedding[real]).max(axis=1) > 0).mean() > 0.5


def test_later_tokens_do_not_change_earlier_logits(split):
    changed = TOKENS.at[:, 6].add(1) % 40
    before, after = forward(*split), forward(*split, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before - after)[:, 6:].max() > 1e-3


@pytest.mark.slow
def test_remat_gives_the_same_gradient_in_less_memory():
    def config(remat):
        return dataclasses.replace(CONFIG, num_layers=12, remat=remat)

    _, params = fresh(config("none"))

    def compiled(remat):
        graphdef, _ = abstract(config(remat))
        step = loss_and_gradient.lower(graphdef, params).compile()
        memory = step.memory_analysis()
        assert memory is not None
        return step(params)[1], memory.temp_size_in_bytes

    found = {name: compiled(name) for name in ("none", *REMAT_POLICIES)}
    assert found["full"][1] < 0.6 * found["none"][1]
    # The more a policy keeps, the more memory it takes.
    assert found["full"][1] < found["weight_dots"][1] < found["dots"][1] < found["none"][1]
    for name in REMAT_POLICIES:
        leaves = jax.tree.leaves(found["none"][0]), jax.tree.leaves(found[name][0])
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_times_unembedding_is_the_logits(tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied, num_layers=1)
    model = merge_model(*fresh(config))
    hidden, matrix = model.hidden(TOKENS, MASK), model.unembedding()
    assert hidden.shape == (3, 10, 32)
    assert matrix.shape == (32, 40)
    assert ("lm_head" in split_model(model)[1]) != tied
    np.testing.assert_allclose(hidden @ matrix, model(TOKENS, MASK), atol=1e-6)


def test_integer_masks_work_as_boolean_ones(split):
    as_bool, as_int = (forward(*split, TOKENS, mask) for mask in (MASK, MASK.astype(jnp.int32)))
    np.testing.assert_array_equal(as_bool, as_int)
