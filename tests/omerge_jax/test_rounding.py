"""The reference term arrives, however far below the last digit of a weight it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import omerge_jax as om
from omerge_jax.rounding import round_compensated, round_stochastically

ALPHA, STEPS, WEIGHT, DELTA = 5e-7, 10_000, 0.02, 1e-3


def accumulate(rounding, dtype, entries, factory=om.on_dare):
    """Parameters after many steps of nothing but the reference term, and what is still due."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (2, entries))
    params = {"w": jnp.asarray(WEIGHT * signs[0], dtype)}
    delta = {"w": jnp.asarray(DELTA * signs[1], jnp.float32)}
    tx = factory(ALPHA, density=1.0, rounding=rounding)
    nothing = {"w": jnp.zeros(entries, dtype)}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(nothing, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, om.with_delta(tx.init(params), delta))
    (moved, state), _ = jax.jit(lambda s: jax.lax.scan(step, s, length=STEPS))(start)
    shift = np.asarray(moved["w"], np.float64) - np.asarray(params["w"], np.float64)
    residual = optax.tree.get(state, "rounding_residual")
    due = np.zeros(entries) if residual is None else np.asarray(residual["w"], np.float64)
    return shift, due, STEPS * ALPHA * np.asarray(delta["w"], np.float64)


def arrived(shift, expected):
    """How much of the expected shift is in the shift, as a projection."""
    return (shift @ expected) / (expected @ expected)


@pytest.mark.parametrize("factory", [om.on_dare, om.on_ties])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_addition_loses_the_reference_term(dtype, factory):
    shift, _, expected = accumulate("nearest", dtype, 256, factory)
    assert abs(arrived(shift, expected)) < 0.01


@pytest.mark.parametrize("factory", [om.on_dare, om.on_ties])
def test_stochastic_rounding_delivers_it_in_float32(factory):
    shift, _, expected = accumulate("stochastic", jnp.float32, 8192, factory)
    assert arrived(shift, expected) == pytest.approx(1, abs=0.01)
    # Entry by entry the noise is that of 10 000 draws of one ulp.
    assert np.abs(shift - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.slow
def test_stochastic_rounding_delivers_it_in_bfloat16():
    """The whole shift is a twentieth of one ulp, so that one weight in 24 moves, by all of an ulp."""
    shift, _, expected = accumulate("stochastic", jnp.bfloat16, 2**20)
    assert arrived(shift, expected) == pytest.approx(1, abs=0.01)
    assert 0.03 < (shift != 0).mean() < 0.06


@pytest.mark.parametrize("factory", [om.on_dare, om.on_ties])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_compensated_rounding_delivers_it_entry_by_entry(dtype, factory):
    shift, due, expected = accumulate("compensated", dtype, 256, factory)
    np.testing.assert_allclose(shift + due, expected, rtol=0.01)
    ulp = float(jnp.finfo(dtype).eps) * 2.0**-6
    assert np.abs(due).max() <= ulp / 2


values = st.floats(-2.0, 2.0, width=32)


@given(
    values,
    st.floats(-1.0, 1.0, width=32),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_stochastic_rounding_goes_to_a_neighbour_and_has_no_bias(param, update, dtype):
    param = jnp.asarray(param, dtype)
    bits = jnp.arange(4096, dtype=jnp.uint32) * jnp.uint32(2**20) + jnp.uint32(2**19)
    rounded = np.asarray(round_stochastically(jnp.float32(update), param, bits), np.float64)
    largest = max(abs(float(param)), abs(update))
    kind = jnp.finfo(dtype)
    normal = max(largest, float(kind.smallest_normal), 2.0**-126 / float(kind.eps))
    ulp = 2.0 ** np.floor(np.log2(normal)) * float(kind.eps)
    if dtype == jnp.float32 and abs(update) > abs(float(param)) / 4:
        # The update has no more digits than a parameter of its size: there is little to round.
        assert np.abs(rounded - update).max() <= 2 * ulp
        return
    assert set(np.unique(rounded)) <= {np.floor(update / ulp) * ulp, np.ceil(update / ulp) * ulp}
    last_digit = abs(update) * 2.0**-24 if dtype == jnp.float32 else 0
    assert abs(rounded.mean() - update) <= ulp / 4096 + last_digit


@given(values, st.lists(st.floats(-(2.0**-10), 2.0**-10, width=32), min_size=1, max_size=8))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_compensation_keeps_what_it_cuts_off(param, updates):
    param, residual, total = jnp.bfloat16(param), jnp.float32(0), 0.0
    for update in updates:
        rounded, residual = round_compensated(jnp.float32(update), residual, param)
        total += float(rounded)
    exact = sum(np.float64(np.float32(u)) for u in updates)
    assert total + float(residual) == pytest.approx(exact, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_emitted_is_what_the_parameter_moves_by(dtype):
    """Else the addition would round a second time, to nearest."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=4000), dtype)}
    updates = {"w": jnp.asarray(1e-3 * rng.normal(size=4000), dtype)}
    tx = om.on_dare(1e-3, density=1.0)
    state = om.with_delta(tx.init(params), updates)
    emitted, _ = tx.update(updates, state, params)
    moved = optax.apply_updates(params, emitted)["w"].astype(jnp.float32)
    same = moved - params["w"].astype(jnp.float32) == emitted["w"].astype(jnp.float32)
    assert float(same.mean()) > 0.97  # all but those that cross into a coarser binade


def test_an_update_that_its_parameter_can_hold_is_left_alone():
    params = {"w": jnp.zeros(1000)}
    updates = {"w": jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)}
    tx = om.online_merge(om.identity(), om.linear(), alpha=jnp.float32(0))
    state = om.with_delta(tx.init(params), updates)
    emitted, _ = tx.update(updates, state, params)
    np.testing.assert_array_equal(emitted["w"], updates["w"])


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_rounding_needs_the_parameters(rounding):
    params = {"w": jnp.ones(3)}
    tx = om.on_dare(0.1, density=0.5, rounding=rounding)
    state = om.with_delta(tx.init(params), params)
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        tx.update(params, state)
    om.on_dare(0.1, density=0.5, rounding="nearest").update(params, state)
    tuned = om.child_tuning(0.5)
    tuned.update(params, tuned.init(params))


@pytest.mark.parametrize("rounding", ["stochastic", "compensated", "nearest"])
def test_a_diagnostic_shows_what_rounding_loses(rounding):
    params = {"w": jnp.ones(2000, jnp.bfloat16)}
    updates = {"w": jnp.full(2000, 2e-3, jnp.bfloat16)}
    tx = om.on_dare(1e-3, density=1.0, rounding=rounding, diagnostics=True)
    state = om.with_delta(tx.init(params), updates)
    _, state = tx.update(updates, state, params)
    lost = float(om.merge_metrics(state)["rounding_lost"])
    # What rounds to nothing is not emitted; only plain addition emits it and loses it.
    assert lost == (1 if rounding == "nearest" else 0)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_merge_is_rounded_by_the_transformation_that_rounds_others(dtype, rounding):
    """Bit for bit: the merge alone, on updates that keep their digits, and then the rounding."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(40, 25)), dtype), "n": jnp.int32(3)}
    delta = {"w": jnp.asarray(1e-3 * rng.normal(size=(40, 25)), jnp.float32), "n": jnp.int32(0)}
    together = om.on_dare(5e-3, density=0.5, rounding=rounding, seed=3)
    apart = optax.chain(
        om.on_dare(5e-3, density=0.5, rounding="nearest", seed=3), om.rounded(rounding, seed=3)
    )
    states = [om.with_delta(tx.init(params), delta) for tx in (together, apart)]
    update_together, update_apart = jax.jit(together.update), jax.jit(apart.update)
    for _ in range(3):
        grads = {"w": jnp.asarray(1e-4 * rng.normal(size=(40, 25)), dtype), "n": jnp.int32(1)}
        wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), grads)
        wide["n"] = grads["n"]
        expected, states[0] = update_together(grads, states[0], params)
        found, states[1] = update_apart(wide, states[1], params)
        assert expected["w"].dtype == dtype
        np.testing.assert_array_equal(found["w"], expected["w"].astype(jnp.float32))
        assert int(found["n"]) == int(expected["n"]) == 1
        params = optax.apply_updates(params, expected)


@pytest.mark.parametrize("how", ["stochastic", "compensated"])
def test_rounded_makes_any_optimizer_move_narrow_parameters(how):
    """A thousandth of the last digit of 1 in bfloat16, 2000 times: two of them."""
    params = {"w": jnp.ones(4096, jnp.bfloat16), "frozen": None}
    updates = {"w": jnp.full(4096, 2.0**-7 / 1000), "frozen": None}
    tx = om.rounded(how, seed=1)

    def step(carry, _):
        params, state = carry
        emitted, state = tx.update(updates, state, params)
        return (optax.apply_updates(params, emitted), state), None

    (moved, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=2000)
    mean = float(moved["w"].astype(jnp.float32).mean())
    assert mean - 1 == pytest.approx(2 * 2.0**-7, rel=0.05)


def test_rounded_to_nearest_does_nothing_and_says_what_it_knows():
    tx = om.rounded("nearest")
    assert tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))[0]["w"].tolist() == [1, 1, 1]
    with pytest.raises(
        ValueError, match="rounding must be 'stochastic', 'compensated' or 'nearest'"
    ):
        om.rounded("up")


@pytest.mark.parametrize("every_k", [1, 3])
def test_steps_between_merges_are_rounded_too(every_k):
    """In bfloat16 small updates arrive on average, merged or passed on."""
    params = {"w": jnp.ones(4096, jnp.bfloat16)}
    updates = {"w": jnp.full(4096, 1e-3, jnp.bfloat16)}
    tx = om.online_merge(om.identity(), om.linear(), alpha=jnp.float32(0), every_k=every_k)
    state = om.with_delta(tx.init(params), updates)
    for _ in range(6):
        emitted, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, emitted)
    moved = float(params["w"].astype(jnp.float32).mean()) - 1
    assert moved == pytest.approx(6 * float(updates["w"][0]), rel=0.1)
