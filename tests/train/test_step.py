from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.builders import (
    COMPLETION,
    OPTIMIZERS,
    PROMPT,
    ROWS,
    VOCAB,
    make_batch,
    make_model,
)
from tests.virtual_devices import run_python
from train.losses import PreferenceLoss, check_starts_at_reference
from train.models import Decoder, merge_model
from train.objectives.logps import AUTO_VOCAB_CHUNK, completion_statistics, resolve_vocab_chunk
from train.objectives.preference import preference_loss, reference_logps_fn
from train.objectives.sft import sft_loss
from train.training.step import init_state, make_train_step


@pytest.fixture(scope="module")
def pairs():
    """A model and a preference batch with the model's own reference log-probabilities."""
    graphdef, params = make_model()
    batch = make_batch(("chosen", "rejected"))
    chosen, rejected = reference_logps_fn(graphdef)(params, batch)
    batch |= {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
    return graphdef, params, batch


@pytest.mark.parametrize("name", ["adamw", "on_dare"])
def test_step_keeps_shapes_and_leaves_the_caller_s_arrays_alone(name, pairs):
    graphdef, params, batch = pairs
    delta = None if name == "adamw" else jax.tree.map(jnp.ones_like, params)
    tx = OPTIMIZERS[name]()
    state = init_state(params, tx, delta)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    step: Any = make_train_step(preference_loss(graphdef), tx)
    first, metrics = state, {}
    for number in range(3):
        state, metrics = step(state, batch)
        assert int(state["step"]) == number + 1
    assert step._cache_size() == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first["params"]))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, state["params"])
    assert all(distance > 0 for distance in jax.tree.leaves(moved))
    if delta is not None:
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(delta))
    merge = {key for key in metrics if key.startswith("merge/")}
    assert bool(merge) == (name != "adamw")
    assert merge >= ({"merge/alpha"} if merge else set())
    assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())


def test_loss_falls_and_rewards_grow_from_zero(pairs):
    graphdef, params, batch = pairs
    tx = optax.adamw(1e-2)
    state, step = init_state(params, tx), make_train_step(preference_loss(graphdef), tx)
    state, first = step(state, batch)
    check_starts_at_reference(first, tolerance=1e-6)
    assert float(first["rewards/accuracies"]) == 0
    last = first
    for _ in range(9):
        state, last = step(state, batch)
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] > 0
    assert last["rewards/accuracies"] == 1


def test_one_forward_of_both_answers_scores_them_as_two_would(pairs):
    graphdef, params, batch = pairs
    shifted = {**batch, "reference_chosen_logps": batch["reference_chosen_logps"] - 3.0}
    calls = []
    hidden = Decoder.hidden

    def counting(self, tokens, mask):
        calls.append(tokens.shape)
        return hidden(self, tokens, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "hidden", counting)
        loss, metrics = jax.jit(preference_loss(graphdef))(params, shifted)
    assert calls == [(2 * ROWS, PROMPT + COMPLETION)]
    model = merge_model(graphdef, params)
    columns = jax.tree.map(jnp.asarray, batch)
    sums = {
        name: completion_statistics(model, columns, name).logps.sum(axis=1)
        for name in ("chosen", "rejected")
    }
    margin = 0.1 * (
        (sums["chosen"] - shifted["reference_chosen_logps"])
        - (sums["rejected"] - shifted["reference_rejected_logps"])
    )
    np.testing.assert_allclose(loss, np.mean(np.logaddexp(0, -margin)), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.3, rtol=1e-4)
    np.testing.assert_allclose(metrics["logps/chosen"], sums["chosen"].mean(), rtol=1e-5)


def test_gradient_norm_is_the_one_before_clipping(pairs):
    graphdef, params, batch = pairs
    loss_fn = preference_loss(graphdef)
    tx = optax.chain(optax.clip_by_global_norm(1e-6), optax.sgd(1.0))
    metrics = make_train_step(loss_fn, tx)(init_state(params, tx), batch)[1]
    gradients = jax.jit(jax.grad(loss_fn, has_aux=True))(params, batch)[0]
    squares = sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_allclose(metrics["grad_norm"], math.sqrt(squares), rtol=1e-5)
    assert metrics["grad_norm"] > 1e-3


def test_sft_learns_the_completions_alone():
    graphdef, params = make_model()
    batch = make_batch(("completion",))
    tx = optax.adam(3e-2)
    state, step = init_state(params, tx), make_train_step(sft_loss(graphdef), tx)
    state, first = step(state, batch)
    np.testing.assert_allclose(first["loss"], math.log(VOCAB), rtol=0.05)
    assert first["num_tokens"] == batch["completion_mask"].sum()
    last = first
    for _ in range(60):
        state, last = step(state, batch)
    assert last["loss"] < 0.1
    assert last["mean_token_accuracy"] == 1
    # Masked tokens have no say in the loss.
    other = {
        **batch,
        "completion_tokens": np.where(batch["completion_mask"], batch["completion_tokens"], 5),
    }
    loss = jax.jit(sft_loss(graphdef))(params, other)[0]
    np.testing.assert_allclose(loss, first["loss"], rtol=1e-6)


def test_vocabulary_is_chunked_when_large(pairs):
    assert resolve_vocab_chunk("auto", 2 * AUTO_VOCAB_CHUNK) is None
    assert resolve_vocab_chunk("auto", 152_000) == AUTO_VOCAB_CHUNK
    assert resolve_vocab_chunk(100, 152_000) == 100
    assert resolve_vocab_chunk(None, 152_000) is None
    graphdef, params, batch = pairs
    plain = jax.jit(preference_loss(graphdef))(params, batch)[1]
    chunked = jax.jit(preference_loss(graphdef, vocab_chunk=17))(params, batch)[1]
    np.testing.assert_allclose(chunked["logps/chosen"], plain["logps/chosen"], rtol=1e-6)


def test_step_is_abstractly_evaluable(pairs):
    graphdef, params, batch = pairs
    tx = OPTIMIZERS["on_dare"]()
    delta = jax.tree.map(jnp.ones_like, params)
    state = jax.eval_shape(lambda p, d: init_state(p, tx, d), params, delta)
    new_state, metrics = jax.eval_shape(
        make_train_step(preference_loss(graphdef), tx), state, batch
    )
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert metrics["loss"].shape == ()


def test_unknown_loss_is_refused_before_tracing(pairs):
    with pytest.raises(ValueError, match=r"Unknown loss_type 'kto'.*sigmoid, ipo, hinge"):
        PreferenceLoss("kto")


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_a_policy_that_is_not_the_reference_is_refused(loss_type, pairs):
    graphdef, params, batch = pairs
    loss_fn = jax.jit(preference_loss(graphdef, PreferenceLoss(loss_type, beta=0.5)))
    check_starts_at_reference(loss_fn(params, batch)[1], PreferenceLoss(loss_type, beta=0.5))
    other = {**batch, "reference_rejected_logps": batch["reference_rejected_logps"] - 1.0}
    with pytest.raises(ValueError, match=r"does not start at.*loss = .* rewards/rejected = 0\.5"):
        check_starts_at_reference(loss_fn(params, other)[1], PreferenceLoss(loss_type, beta=0.5))
    broken = {**batch, "reference_chosen_logps": batch["reference_chosen_logps"] * math.nan}
    with pytest.raises(ValueError, match="rewards/chosen = nan"):
        check_starts_at_reference(loss_fn(params, broken)[1], PreferenceLoss(loss_type, beta=0.5))


# Virtual devices have to be asked for before jax starts, so this runs in its own process.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.train.builders import CONFIG, OPTIMIZERS, make_batch, make_model
from train.models import ModelConfig, param_shardings
from train.objectives.preference import *
from train.training.step import *
import omerge_jax as om
from omerge_jax.state import merge_states

SPARSE = {"density": 0.1, "delta_mask": "fixed", "storage": "sparse"}
OPTIMIZERS = OPTIMIZERS | {"sparse": lambda: om.on_dare_adamw(1e-2, alpha=1e-3, **SPARSE)}
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
graphdef, params = make_model()
batch = make_batch(("chosen", "rejected"))
batch["reference_chosen_logps"] = batch["reference_rejected_logps"] = np.zeros(4, np.float32)
spread = jax.device_put(params, param_shardings(ModelConfig.from_hf(CONFIG), mesh))
rows = jax.device_put(batch, NamedSharding(mesh, P("fsdp")))
for name, make in OPTIMIZERS.items():
    tx, delta = make(), None if name == "adamw" else jax.tree.map(jnp.ones_like, params)
    loss_fn = preference_loss(graphdef, vocab_chunk=17)
    state, step = init_state(params, tx, delta), make_train_step(loss_fn, tx)
    with jax.set_mesh(mesh):
        split = init_state(spread, tx, delta and jax.tree.map(jnp.ones_like, spread))
        layout = state_shardings(split, spread)
        assert layout == jax.tree.map(lambda x: x.sharding, split)
        like = [x.sharding for x in jax.tree.leaves(split["opt_state"])]
        assert sum(not s.is_fully_replicated for s in like) >= 2 * 9, like
        held = merge_states(split["opt_state"])
        for leaf in jax.tree.leaves(held[0].reference_delta if held else None):
            if leaf.size > 16:  # a matrix, or the entries that are kept of one
                assert not leaf.sharding.is_fully_replicated, leaf.shape
        split_step = make_train_step(loss_fn, tx, shardings=layout)
        for _ in range(3):
            state, metrics = step(state, batch)
            split, split_metrics = split_step(split, rows)
        assert split_step._cache_size() == 1
        assert layout == jax.tree.map(lambda x: x.sharding, split)
    for key, value in metrics.items():
        np.testing.assert_allclose(split_metrics[key], value, rtol=2e-4, err_msg=key)
    print(name, "is the same on 4 devices")
"""


@pytest.mark.slow
def test_step_on_a_mesh_keeps_its_layout_and_its_numbers():
    shown = run_python("-c", PROGRAM, devices=4)
    assert shown.count("is the same on 4 devices") == 4
