"""One test for each edge: what passes through, what is refused, and with which words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import omerge_jax as om
from omerge_jax.state import merge_states
from tests.omerge_jax.builders import ALL, MERGES, OPTIMIZERS, OTHERS, marks, named, start, tree
from tests.virtual_devices import run_python


def each_of(cases):
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=name, marks=marks(name)) for name, case in cases.items()]
    )


each, each_merge = each_of(ALL), each_of(MERGES)
CONTEXT = om.SparsifyContext(jnp.int32(0), ("w",), "update")


# Leaves that are not real numbers.


@pytest.mark.parametrize(
    ("name", "every_k"), [(n, k) for n in ALL for k in (1, 2) if k == 1 or n not in OTHERS]
)
def test_integer_leaves_pass_through(name, every_k):
    """Whole optimizers are given a gradient of 0, as an integer has no other."""
    spans = every_k > 1
    tx = ALL[name].make(**({"every_k": every_k} if spans else {}))
    moves = jnp.int32(0 if name in OPTIMIZERS else 3)
    params = tree(0) | {"count": jnp.int32(1000)}
    updates = tree(2) | {"count": moves}
    if name == "anchored opposing":
        tx = ALL[name].make(delta=tree(1) | {"count": jnp.float32(0)})
    state = start(tx, params, tree(1) | {"count": jnp.zeros(())})
    # The other leaves are traced, but not compiled.
    update = jax.jit(lambda state: tx.update(updates, state, params)[0]["count"])
    for step in range(every_k):
        found = update(optax.tree.set(state, **({"merge_count": jnp.int32(step)} if spans else {})))
        assert int(found) == int(moves)
        assert name in OPTIMIZERS or found.dtype == jnp.int32


def test_integer_leaves_of_a_base_pass_through_an_offline_merge():
    base, model = ({"w": jnp.full(3, w), "count": jnp.int32(n)} for w, n in ((1.0, 7), (2.0, 8)))
    merged = om.offline_merge(base, [model], method="task_arithmetic", weights=[1.0])
    assert int(merged["count"]) == 7


@pytest.mark.parametrize("name", named([*MERGES, "anchored"]))
def test_complex_leaves_are_refused_by_name(name):
    params = {"z": jnp.ones(3, jnp.complex64)}
    tx = ALL[name].make()
    state = start(tx, params, {"z": jnp.ones(3)})
    with pytest.raises(ValueError, match="z is complex64, but only real parameters can be merged"):
        tx.update(params, state, params)


# Values that are not finite.


@pytest.mark.parametrize("rounding", ["stochastic", "compensated", "nearest"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_an_infinite_update_keeps_its_sign(rounding, dtype):
    update = {"w": jnp.array([jnp.inf, -jnp.inf, jnp.nan], dtype)}
    params = {"w": jnp.ones(3, dtype)}
    tx = om.on_dare(alpha=0.1, density=1.0, rounding=rounding)
    found, _ = tx.update(update, start(tx, params, {"w": jnp.ones(3)}), params)
    np.testing.assert_array_equal(
        np.asarray(found["w"], np.float32), np.asarray(update["w"], np.float32)
    )


@pytest.mark.parametrize(
    "keep",
    [
        om.random(0.9, rescale="norm"),
        om.magnitude(0.5, rescale="norm"),
        om.magnitude_ranked(0.6, epsilon=0.1, rescale="norm"),
        om.band(0.5, rescale="norm"),
    ],
    ids=["random", "magnitude", "ranked", "band"],
)
def test_a_nan_that_a_norm_is_taken_of_is_not_hidden(keep):
    x = jnp.arange(1.0, 21.0).at[15].set(jnp.nan)
    kept = np.asarray(keep(x, CONTEXT))
    assert np.isnan(kept[15])
    assert np.isnan(kept).sum() > 5, "the others must not be silently 0"


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_band_does_not_hide_what_is_not_finite(bad):
    x = jnp.arange(1.0, 101.0).at[3].set(bad)
    kept = om.band(0.2, gamma=0.1)(x, CONTEXT)
    np.testing.assert_array_equal(kept[3], bad)
    assert 19 <= int((kept[jnp.isfinite(x)] != 0).sum()) <= 20


# Arguments.


def merging(sparsifier, consensus=None):
    return om.online_merge(sparsifier, consensus or om.linear(), alpha=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: om.on_dare(alpha=0.1, density=0.5, seed=0.7), "seed .*integer.*got seed = 0.7"),
        (
            lambda: om.on_ties(alpha=0.1, density=0.5, seed=jax.random.key(0)),
            r"seed must be an integer.*got seed = Array",
        ),
        (lambda: om.band(0.5, seed="0"), "seed must be an integer.*got seed = '0'"),
        (lambda: om.on_dare(alpha=np.float32(2.0), density=0.5), r"\[0, 1\], got alpha = 2.0"),
        (lambda: om.on_dare(alpha="1.5", density=0.5), r"number in \[0, 1\], got alpha = '1.5'"),
        (lambda: om.on_dare(alpha=None, density=0.5), r"number in \[0, 1\], got alpha = None"),
        (lambda: om.on_dare(alpha=jnp.ones(2), density=0.5), "must be a number in .* got alpha"),
        (lambda: om.on_ties(alpha=0.1, density=None), r"number in \(0, 1\], got density = None"),
        (lambda: om.on_ties(alpha=0.1, density="0.5"), "must be a number .* got density = '0.5'"),
        (lambda: om.random(jnp.float32(1.5)), r"must be in \(0, 1\], got density = 1.5"),
        (lambda: om.random(0.5, clip=-1), "clip is .* must be above 0, got clip = -1"),
        (lambda: om.random(0.5, clip="1"), "clip is .* a number above 0, got clip = '1'"),
        (lambda: om.magnitude_ranked(0.5, epsilon="0.1"), "number at least 0, got epsilon = '0.1'"),
        (lambda: om.band(0.5, gamma=None), r"number in \[0, 1\), got gamma = None"),
        (lambda: om.relative("0.5"), "must be a number .* got share = '0.5'"),
        (lambda: om.relative(None), "must be a number .* got share = None"),
        (lambda: om.anchored(np.float32(1.5)), r"\[0, 1\], got rate = 1.5"),
        (lambda: om.anchored(None), "must be a number .* got rate = None"),
        (lambda: om.on_dare_adamw(1e-3, alpha=-1, density=0.5), "got alpha = -1"),
        (lambda: merging(om.random), r"sparsifier must be a callable \(x, ctx\).*<function random"),
        (lambda: merging(om.identity), r"sparsifier must be a callable.*<function identity"),
        (lambda: merging("magnitude"), "sparsifier must be a callable .* got sparsifier = 'magni"),
        (lambda: merging(None), "sparsifier must be a callable .* got sparsifier = None"),
        (lambda: merging(om.identity(), om.sign), "consensus must be a callable .*<function sign"),
        (lambda: merging(om.identity(), "sign"), "consensus must be a callable .* = 'sign'"),
        (lambda: om.on_dare(alpha=0.1, density=0.5, every_k=None), "every_k .*got every_k = None"),
        (lambda: om.on_dare(alpha=0.1, density=0.5, every_k=2.0), "every_k .*got every_k = 2.0"),
        (lambda: om.on_dare(alpha=0.1, density=0.5, rounding=None), "rounding must be .* = None"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), jnp.float32(0.5), 1])
def test_numbers_of_any_type_are_numbers(number):
    om.on_dare(alpha=number, density=number, clip=number, seed=np.int64(3))
    om.anchored(number)


above = optax.linear_schedule(0.5, 1.5, 2)
SCHEDULES = {
    "alpha": lambda: om.on_dare(alpha=above, density=0.5),
    "share": lambda: om.on_dare(alpha=om.relative(above), density=0.5),
    "density": lambda: om.on_dare(alpha=0.1, density=above),
    "rate": lambda: om.anchored(above),
    "injected alpha": lambda: optax.inject_hyperparams(om.on_dare)(alpha=above, density=0.5),
    "injected density": lambda: optax.inject_hyperparams(om.child_tuning)(density=above),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_leaves_its_range_is_reported(name):
    """At once outside of jit; under jit to whoever asks with checkify, and to nobody else."""
    tx, params = SCHEDULES[name](), {"w": jnp.ones(3)}
    message = rf"{name.split()[-1]} is the .* must be in .* got {name.split()[-1]} = 1.5"
    state = start(tx, params, params)
    checked = jax.jit(checkify.checkify(tx.update, errors=checkify.user_checks))
    plain = jax.jit(tx.update)
    for _ in range(2):
        error, _ = checked(params, state, params)
        assert error.get() is None
        _, state = plain(params, state, params)
    plain(params, state, params)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        checked(params, state, params)[0].throw()
    with pytest.raises(ValueError, match=message):
        tx.update(params, state, params)


# Which of two numbers is which.


@pytest.mark.parametrize("factory", [om.on_dare, om.on_ties])
def test_alpha_and_density_cannot_be_swapped_silently(factory):
    with pytest.raises(TypeError):
        factory(1e-2, 5e-7)
    with pytest.raises(
        ValueError, match=r"seem to be swapped, got alpha = 0.1 and density = 1e-06"
    ):
        factory(alpha=0.1, density=1e-6)
    with pytest.raises(ValueError, match="seem to be swapped"):
        om.online_merge(om.random(5e-7), om.linear(), alpha=1e-2)
    factory(alpha=1e-3, density=1e-5)
    factory(alpha=0.1, density=optax.constant_schedule(1e-6))


# The delta.


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (lambda d: jax.tree.map(jnp.zeros_like, d), "delta is zero everywhere"),
        (lambda d: d | {"scale": jnp.int32(2)}, "delta leaf scale is int32, but"),
        (
            lambda d: d | {"scale": jnp.float32(jnp.nan)},
            "delta leaf scale has entries that are not",
        ),
        (lambda d: d | {"scale": np.float32(np.inf)}, "delta leaf scale has entries that are not"),
        (lambda d: d | {"scale": jnp.complex64(1)}, "delta leaf scale is complex64, but"),
    ],
    ids=["zero", "integer", "nan", "inf", "complex"],
)
def test_a_delta_that_makes_no_sense_is_refused(delta, message):
    params, delta = tree(0), delta(tree(1))
    tx = om.on_dare(alpha=0.1, density=0.5)
    with pytest.raises(ValueError, match=message):
        om.with_delta(tx.init(params), delta)
    with pytest.raises(ValueError, match=message):
        om.on_dare(alpha=0.1, density=0.5, delta=delta)
    with pytest.raises(ValueError, match=message):
        om.anchored(0.1, gate="opposing", delta=delta)
    jax.jit(om.with_delta)(tx.init(params), delta)


def test_a_leaf_that_did_not_change_may_have_a_delta_of_zeros():
    delta = tree(1) | {"scale": jnp.zeros(()), "count": jnp.int32(0)}
    params = tree(0) | {"count": jnp.int32(3)}
    om.with_delta(om.on_ties(alpha=0.1, density=0.5).init(params), delta)


@pytest.mark.parametrize("every_k", [1, 2])
def test_a_sweep_may_begin_at_alpha_zero(every_k):
    params = tree(0)
    for alpha in (0, 0.0, np.float32(0), 0.1):
        tx = om.on_dare(alpha=alpha, density=0.5, every_k=every_k)
        state = om.with_delta(tx.init(params), tree(1))
        assert (merge_states(state)[0].reference_delta is None) == (alpha == 0)
        tx.update(params, state, params)
    child = om.child_tuning(0.5).init(params)
    assert om.with_delta(child, tree(1)) == child


# Hyperparameters that are static.


@pytest.mark.parametrize("factory", [om.on_dare, om.on_ties])
def test_every_k_is_static_under_injection(factory):
    params = tree(0)
    injected = optax.inject_hyperparams(factory)(alpha=0.1, density=0.5)
    (merge,) = merge_states(injected.init(params))
    assert merge.merged_params is None, "no memory for a span of one step"
    assert "every_k" not in injected.init(params).hyperparams
    with pytest.raises(ValueError, match=r"every_k .* static_args"):
        optax.inject_hyperparams(factory)(alpha=0.1, density=0.5, every_k=2).init(params)
    spans = optax.inject_hyperparams(factory, "every_k")(alpha=0.1, density=0.5, every_k=2)
    jax.eval_shape(spans.update, params, start(spans, params), params)


# Abstract parameters, strict promotion, whole models, shards.


@each
def test_init_takes_abstract_parameters(case):
    params = tree(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    tx = case.make()
    found, real = tx.init(abstract), tx.init(params)
    assert jax.tree.structure(found) == jax.tree.structure(real)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(real), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strict_promotion_of_dtypes(case, dtype):
    params, tx = tree(0, dtype), case.make()
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = jax.eval_shape(tx.update, tree(2, dtype), start(tx, params), params)
    assert all(x.dtype == dtype for x in jax.tree.leaves(updates))


@each_merge
def test_strict_promotion_with_diagnostics_and_injected_numbers(case):
    numbers = {"alpha", "density"} & case.options.keys()
    static = set(case.options) - numbers
    if isinstance(case.options.get("alpha"), om.Relative):
        static |= {"alpha"}
    tx = optax.inject_hyperparams(case.factory, static | {"every_k"})(
        **(case.options | {"diagnostics": True, "every_k": 2})
    )
    params = tree(0, jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(tx.update, params, start(tx, params), params)


@jax.tree_util.register_pytree_with_keys_class
class Layer:
    """A module in the manner of Equinox: its activation is a leaf like any other."""

    def __init__(self, weight, activation):
        self.weight, self.activation = weight, activation

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return [(key("weight"), self.weight), (key("activation"), self.activation)], None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def test_a_whole_model_in_place_of_its_arrays_is_named():
    model, arrays = Layer(jnp.ones(2), jnp.tanh), Layer(jnp.zeros(2), None)
    message = (
        r"activation in reference is not an array.*eqx\.filter\(model, eqx\.is_inexact_array\)"
    )
    with pytest.raises(ValueError, match=message):
        om.task_vector({"layer": model}, {"layer": model})
    with pytest.raises(ValueError, match=r"activation in base is not an array.*eqx\.filter"):
        om.task_vector({"layer": {"activation": jnp.ones(2)}}, {"layer": model})
    assert om.task_vector(arrays, model).weight.tolist() == [-1, -1]


SHARDS = """
import jax, jax.numpy as jnp, numpy as np, omerge_jax as om
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
params, delta = ({"w": jnp.sin(jnp.arange(64.0) + i)} for i in (1, 2))

def message(f, *arguments):
    try:
        jax.eval_shape(f, *arguments)
    except ValueError as error:
        return str(error)
    raise AssertionError("shards were merged as if they were leaves")

for tx in (om.on_dare(alpha=0.1, density=0.5), om.on_ties(alpha=0.1, density=0.5)):
    state = om.with_delta(tx.init(params), delta)
    update = lambda p, s: tx.update(p, s, p)[0]
    mapped = lambda spec, **how: jax.shard_map(
        update, mesh=mesh, in_specs=(spec, P()), out_specs=spec, **how)
    split = jax.tree.map(lambda x: P("x") if x.shape == (64,) else P(), state)
    whole = jax.shard_map(
        update, mesh=mesh, in_specs=(P("x"), split), out_specs=P("x"))
    assert "inside jax.shard_map or jax.pmap over 'x', w is another one" in message(
        whole, params, state)
    assert "w may be a shard (check_vma=False)" in message(
        mapped(P(), check_vma=False), params, state)
    # Replicas are whole leaves: every device makes the same merge.
    found = jax.jit(mapped(P()))(params, state)["w"]
    np.testing.assert_allclose(found, jax.jit(update)(params, state)["w"], rtol=1e-6)
merge = lambda p, d: om.offline_merge(p, [d], method="ties", weights=[1.0], density=0.5)
sharded = jax.shard_map(merge, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
assert "w is another one on every device" in message(sharded, params, delta)
"""


def test_shards_are_not_merged_as_if_they_were_leaves():
    run_python("-c", SHARDS, devices=4)
