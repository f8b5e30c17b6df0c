"""One-shot merges against float64 references written from the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import omerge_jax as om
from tests.virtual_devices import run_python

SHAPES = {"w": (6, 9), "b": (11,), "s": ()}


def models(count, shapes=None):
    rng = np.random.default_rng(0)
    trees = [{k: rng.normal(size=s) for k, s in (shapes or SHAPES).items()} for _ in range(count)]
    return [
        {k: jnp.asarray(v, jnp.float32) for k, v in t.items()} | {"n": jnp.arange(3) + i}
        for i, t in enumerate(trees)
    ]


def uniform(name, role, shape):
    rng = np.random.default_rng([*name.encode(), *role.encode()])
    return rng.uniform(size=shape).astype(np.float32)


def draw(x, probability, ctx):
    return jnp.asarray(uniform(ctx.path[0], ctx.role, x.shape)) < probability


# The references: sparsifiers return (mask, probability with which an entry was kept).


def largest(x, count, skip=0):
    order = np.argsort(-np.abs(x).ravel(), kind="stable")
    mask = np.zeros(x.size, bool)
    mask[order[skip : skip + count]] = True
    return mask.reshape(x.shape)


def keep_top(x, u, density, **_):
    return largest(x, max(1, int(density * x.size))), 1


def keep_random(x, u, density, **_):
    return u < density, density


def keep_ranked(x, u, density, epsilon, **_):
    """Ranks run along the last axis; one entry alone has no rank."""
    if x.size == 1:
        return u < density, density
    rank = np.argsort(np.argsort(np.abs(x), axis=-1), axis=-1) / (x.shape[-1] - 1)
    probability = density - epsilon + 2 * epsilon * rank
    return u < probability, probability


def keep_band(x, u, density, gamma, **_):
    n, kept = x.size, int(density * x.size)
    return largest(x, kept, skip=n - kept - max(0, n - kept - int(gamma * n))), 1


KEEP = {"ties": keep_top, "dare": keep_random, "della": keep_ranked, "breadcrumbs": keep_band}


def reference(method, name, base, others, weights, settings):
    normalize, election, rescale = (settings.get(k) for k in ("normalize", "election", "rescale"))
    terms, votes = [], []
    for i, (weight, other) in enumerate(zip(weights, others, strict=True)):
        delta = np.asarray(other, np.float64) - np.asarray(base, np.float64)
        mask, probability = KEEP[method.split("_")[0]](
            delta, uniform(name, f"model{i}", delta.shape), **settings
        )
        kept = np.where(mask, delta, 0)
        if rescale == "inverse":
            kept = kept / probability
        elif rescale == "norm" and mask.any():
            kept = kept * np.abs(delta).sum() / np.abs(kept).sum()
        terms.append(weight * kept)
        votes.append(kept)
    terms, votes = np.stack(terms), np.stack(votes)
    votes = votes if election == "unweighted" else terms
    votes, ballot = np.sign(votes), (np.sign(votes) if election == "count" else votes).sum(0)
    enters = np.ones(terms.shape) if election is None else votes == np.where(ballot >= 0, 1, -1)
    divisor = np.tensordot(weights, enters, 1) if normalize else 1
    return np.asarray(base, np.float64) + settings.get("scale", 1) * (terms * enters).sum(
        0
    ) / np.where(divisor == 0, 1, divisor)


CASES = [
    ("ties", {"density": 0.4}, {"normalize": True, "election": "weighted"}),
    ("ties", {"density": 0.05, "election": "unweighted", "normalize": False, "scale": 0.7}, {}),
    ("ties", {"density": 0.8, "election": "count", "rescale": "norm"}, {"normalize": True}),
    ("dare_linear", {"density": 0.4}, {"rescale": "norm"}),
    ("dare_linear", {"density": 0.4, "rescale": "none", "normalize": True}, {}),
    ("dare_ties", {"density": 0.6, "rescale": "inverse"}, {"election": "weighted"}),
    ("della", {"density": 0.4}, {"epsilon": 0.15, "rescale": "norm", "normalize": True}),
    ("della_linear", {"density": 0.5, "epsilon": 0.4, "rescale": "inverse"}, {}),
    ("breadcrumbs", {"density": 0.4}, {"gamma": 0.01}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.2, "rescale": "norm"}, {}),
    ("breadcrumbs_ties", {"density": 0.7, "gamma": 0.4}, {"election": "weighted"}),
]


@pytest.mark.parametrize(("method", "given", "defaults"), CASES)
def test_methods_follow_their_papers(method, given, defaults):
    base, *others = models(4)
    weights = [0.5, -0.3, 0.9]
    source = {"draw": draw} if method.startswith("d") else {}
    merged = om.offline_merge(base, others, method=method, weights=weights, **given, **source)
    settings = {**defaults, **given}
    if method.startswith("della") or method.endswith("ties"):
        settings.setdefault("election", None if method == "della_linear" else "weighted")
    for name in SHAPES:
        expected = reference(method, name, base[name], [o[name] for o in others], weights, settings)
        np.testing.assert_allclose(merged[name], expected, rtol=2e-6, atol=1e-6)
    assert merged["n"].tolist() == base["n"].tolist()


def test_linear_is_the_weighted_mean_and_ignores_the_base():
    base, a, b = models(3)
    merged = om.offline_merge(base, [a, FrozenDict(b)], weights=[0.3, 0.9])
    total = om.offline_merge(base, [a, b], weights=[0.3, -0.3], normalize=False)
    for name in SHAPES:
        x, y = np.asarray(a[name], np.float64), np.asarray(b[name], np.float64)
        np.testing.assert_allclose(merged[name], (0.3 * x + 0.9 * y) / 1.2, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(total[name], 0.3 * x - 0.3 * y, rtol=1e-6, atol=1e-7)
    assert merged["n"].tolist() == [0, 1, 2]


def test_task_arithmetic_adds_weighted_task_vectors():
    base, a, b = models(3)
    by_path = {("w",): [0.5, -0.2], ("b",): [0.0, 1.0], ("s",): [1.0, 1.0]}
    merge = functools.partial(om.offline_merge, base, [a, b], method="task_arithmetic")
    merged = merge(weights=by_path.__getitem__)
    half = merge(weights=jnp.array([0.25, -0.1]), scale=2.0)
    mean = merge(weights=[0.5, -0.2], normalize=True)
    difference = merge(weights=[0.5, -0.5], normalize=True)
    for name in SHAPES:
        o, x, y = (np.asarray(t[name], np.float64) for t in (base, a, b))
        u, v = by_path[name,]
        np.testing.assert_allclose(merged[name], o + u * (x - o) + v * (y - o), rtol=1e-5)
        delta = 0.5 * (x - o) - 0.2 * (y - o)
        np.testing.assert_allclose(half[name], o + delta, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(mean[name], o + delta / 0.3, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(difference[name], o + 0.5 * (x - y), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_great_circle(t):
    base, other = models(2)
    other |= {"s": -base["s"], "b": 2 * base["b"]}
    merged = om.offline_merge(base, [other], method="slerp", t=lambda path: t)
    o, x = np.asarray(base["w"], np.float64), np.asarray(other["w"], np.float64)
    angle = np.arccos((o * x).sum() / np.linalg.norm(o) / np.linalg.norm(x))
    expected = (np.sin((1 - t) * angle) * o + np.sin(t * angle) * x) / np.sin(angle)
    np.testing.assert_allclose(merged["w"], expected, rtol=1e-6, atol=1e-6)
    for name in ("s", "b"):
        line = (1 - t) * base[name] + t * other[name]
        np.testing.assert_allclose(merged[name], line, rtol=1e-6, atol=1e-7)
    zero = om.offline_merge({"w": jnp.zeros(3)}, [{"w": jnp.ones(3)}], method="slerp", t=0.5)
    np.testing.assert_allclose(zero["w"], np.sin(np.pi / 4) * np.ones(3), rtol=1e-6)


METHODS = {
    "ties": {"weights": [0.5, 0.8], "density": [0.3, 0.6]},
    "dare_ties": {"weights": [0.5, 0.8], "density": 0.4, "seed": 3},
    "della": {"weights": [0.5, 0.8], "density": 0.4, "epsilon": [0.1, 0.3], "rescale": "inverse"},
    "breadcrumbs": {"weights": [0.5, 0.8], "density": 0.4, "gamma": [0.1, 0.2]},
    "slerp": {"t": 0.3},
}


@pytest.mark.parametrize("method", METHODS)
def test_stacked_layers_are_separate_tensors(method):
    stacked = models(3, {"w": (4, 6, 9)})
    stacked = stacked[:2] if method == "slerp" else stacked
    settings = {"method": method, **METHODS[method]}
    drawn = "draw" if method in ("dare_ties", "della") else None
    how = settings | ({drawn: draw} if drawn else {})
    merged = om.offline_merge(stacked[0], stacked[1:], layer_axes={"w": 1, "n": 0}, **how)
    for layer in range(4):

        def draw_layer(x, probability, ctx, layer=layer):
            return jnp.asarray(uniform("w", ctx.role, (4, *x.shape))[layer]) < probability

        base, *others = ({"w": tree["w"][layer]} for tree in stacked)
        how = settings | ({drawn: draw_layer} if drawn else {})
        alone = om.offline_merge(base, others, **how)
        np.testing.assert_allclose(merged["w"][layer], alone["w"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_computed_in_float32(method):
    trees = [{"w": tree["w"].astype(jnp.bfloat16)} for tree in models(3)]
    trees = trees[:2] if method == "slerp" else trees
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in trees]
    merged = om.offline_merge(trees[0], trees[1:], method=method, **METHODS[method])
    expected = om.offline_merge(wide[0], wide[1:], method=method, **METHODS[method])
    shapes = jax.eval_shape(
        lambda b, o: om.offline_merge(b, o, method=method, **METHODS[method]), trees[0], trees[1:]
    )
    assert merged["w"].dtype == shapes["w"].dtype == jnp.bfloat16
    assert (merged["w"] == expected["w"].astype(jnp.bfloat16)).all()


@pytest.mark.parametrize("method", METHODS)
def test_compiled_is_the_same_merge(method):
    base, *others = models(2 if method == "slerp" else 3, {"w": (6, 9)})
    merge = functools.partial(om.offline_merge, method=method, **METHODS[method])
    eager, compiled = merge(base, others), jax.jit(merge)(base, others)
    np.testing.assert_allclose(eager["w"], compiled["w"], rtol=2e-6, atol=2e-7)


def test_seed_path_and_model_tell_masks_apart():
    base = {"u": jnp.zeros((30, 40)), "v": jnp.zeros((30, 40))}
    ones = jax.tree.map(jnp.ones_like, base)
    dare = functools.partial(om.offline_merge, base, method="dare_linear", rescale="none")
    first = dare([ones, ones], weights=[1.0, 0.0], density=0.3)
    again = dare([ones, ones], weights=[1.0, 0.0], density=0.3, seed=0)
    second = dare([ones, ones], weights=[0.0, 1.0], density=0.3)
    other = dare([ones, ones], weights=[1.0, 0.0], density=0.3, seed=1)
    assert (first["u"] == again["u"]).all()
    for x in (first["v"], second["u"], other["u"]):
        assert abs(float(x.mean()) - 0.3) < 0.06
        assert abs(np.corrcoef(x.ravel(), first["u"].ravel())[0, 1]) < 0.1


def test_tied_leaves_stay_one_array():
    trees = [{"embed": (x := jnp.asarray(t["w"])), "head": x} for t in models(3)]
    settings = {"method": "dare_linear", "weights": [0.5, 0.5], "density": 0.5}
    merged = om.offline_merge(trees[0], trees[1:], **settings)
    assert merged["head"] is merged["embed"]
    untied = trees[2] | {"head": trees[2]["head"] + 1}
    merged = om.offline_merge(trees[0], [trees[1], untied], **settings)
    assert not (merged["head"] == merged["embed"]).all()


def test_containers_may_differ_and_the_base_gives_the_structure():
    base, a, b = ({"layer": {"kernel": tree["w"]}} for tree in models(3))
    merged = om.offline_merge(
        nnx.State({"layer": {"kernel": nnx.Param(base["layer"]["kernel"])}}),
        [FrozenDict(a), b],
        method="ties",
        weights=[1.0, 1.0],
    )
    assert isinstance(merged, nnx.State)
    plain = om.offline_merge(base, [a, b], method="ties", weights=[1.0, 1.0])
    assert (merged["layer"]["kernel"][...] == plain["layer"]["kernel"]).all()


ALPHA, DENSITY, STEPS = 0.2, 0.4, 3


@pytest.mark.parametrize("election", ["weighted", "unweighted", None])
def test_the_last_of_k_steps_is_an_offline_merge(election):
    """Step-K with K the number of steps; None is OnDARE."""
    reference, delta, *gradients = ({"w": t["w"]} for t in models(5, {"w": (12, 9)}))

    def pick(x, density, ctx):
        ours = ctx.role in ("update", "model0")
        return jnp.asarray(np.random.default_rng(int(ours)).uniform(size=x.shape) < density)

    # Stochastic rounding of the steps in between would be divided by the density with the span.
    span = {"density": DENSITY, "every_k": STEPS, "rounding": "nearest"}
    online = (
        om.on_ties(ALPHA, election=election, **span)
        if election
        else om.on_dare(ALPHA, clip=None, draw=pick, **span)
    )
    adamw = optax.adamw(1e-2)
    trained = run(optax.chain(adamw, online), reference, delta, gradients)
    plain = run(adamw, reference, None, gradients)
    how = (
        {"method": "ties", "election": election}
        if election
        else {"method": "dare_linear", "rescale": "inverse", "draw": pick}
    )
    tau_model = jax.tree.map(jnp.add, reference, delta)
    merged = om.offline_merge(
        reference,
        [plain, tau_model],
        weights=[1 - ALPHA, ALPHA],
        normalize=False,
        density=DENSITY,
        **how,
    )
    assert float(jnp.abs(merged["w"] - plain["w"]).max()) > 0.01
    np.testing.assert_allclose(trained["w"], merged["w"], rtol=0, atol=5e-7)


def run(tx, params, delta, gradients):
    state = tx.init(params)
    state = state if delta is None else om.with_delta(state, delta)
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


SHARDED = """
import re, jax, jax.numpy as jnp, numpy as np, omerge_jax as om
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
trees = [{"w": rng.normal(size=(64, 24)).astype(np.float32)} for _ in range(3)]
place = NamedSharding(mesh, P("x"))
for method in ("ties", "della", "slerp"):
    how = {"t": 0.3} if method == "slerp" else {"weights": [0.5, 0.8], "density": 0.4}
    used = trees[:2] if method == "slerp" else trees
    f = jax.jit(lambda base, *others: om.offline_merge(base, others, method=method, **how))
    placed = jax.device_put(used, place)
    program = f.lower(*placed).compile()
    merged = program(*placed)["w"]
    assert merged.sharding.is_equivalent_to(place, 2), (method, merged.sharding)
    # Sums over another layout round differently.
    np.testing.assert_allclose(merged, f(*used)["w"], rtol=1e-5, atol=1e-5)
    gathers = [line for line in program.as_text().splitlines() if " all-gather(" in line]
    shapes = [s for line in gathers for s in re.findall(r"\\w+\\[([\\d,]+)\\]", line)]
    # One count per device and candidate of a threshold, whatever the size of the tensor.
    assert all(np.prod([int(n) for n in s.split(",")]) <= 8 * 15 for s in shapes), (method, shapes)
"""


def test_sharded_leaves_are_not_gathered():
    run_python("-c", SHARDED, devices=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "tise"},
            "method must be one of linear, task_arithmetic, .* got method = 'tise'",
        ),
        ({"weights": None}, "'linear' needs weights"),
        ({"weights": [1.0]}, "weights must be one a model, got 1 for 2"),
        (
            {"weights": lambda path: [1.0]},
            "weights for the leaf b must be one a model, got 1 for 2",
        ),
        ({"weights": [1.0, -1.0]}, "must not sum to 0"),
        ({"weights": [1.0, float("nan")]}, "weights must be finite"),
        (
            {"density": 0.5},
            "'linear' does not use density, got density = 0.5; .* weights, normalize",
        ),
        ({"method": "task_arithmetic", "seed": 1}, "does not use seed"),
        ({"method": "ties", "gamma": 0.1}, "does not use gamma"),
        ({"method": "ties", "draw": draw}, "does not use draw"),
        ({"method": "dare_linear", "election": "count"}, "does not use election"),
        ({"method": "breadcrumbs", "epsilon": 0.1}, "does not use epsilon"),
        ({"method": "ties", "density": 1.5}, "density is the share .* got density = 1.5"),
        ({"method": "ties", "density": [0.5]}, "density needs one entry a model, got 1 for 2"),
        ({"method": "ties", "density": [0.5, 0]}, "got density = 0"),
        (
            {"method": "ties", "rescale": "inverse"},
            "rescale of method 'ties' must be one of 'norm', 'n",
        ),
        (
            {"method": "dare_ties", "rescale": True},
            "must be one of 'inverse', 'norm', 'none', got True",
        ),
        ({"method": "ties", "election": "sum"}, "election of method 'ties' .* got 'sum'"),
        ({"method": "ties", "scale": float("inf")}, "scale must be finite"),
        ({"method": "ties", "normalize": "yes"}, "normalize .* got 'yes'"),
        ({"method": "della", "density": 0.9}, "density = 0.9 and epsilon = 0.15"),
        (
            {"method": "della", "epsilon": [0.1, -0.1]},
            "epsilon must be at least 0, got epsilon = -0.1",
        ),
        ({"method": "della", "rank_axis": 2}, r"got 2 for the leaf w of shape \(6, 9\)"),
        ({"method": "breadcrumbs", "gamma": 1.0}, r"gamma .* in \[0, 1\), got gamma = 1.0"),
        ({"method": "ties", "layer_axes": 3}, "layer_axes must be between 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    base, a, b = models(3)
    with pytest.raises(ValueError, match=message):
        om.offline_merge(base, [a, b], **{"weights": [1.0, 2.0], **settings})


def test_slerp_merges_one_model_and_needs_t():
    base, a, b = models(3)
    slerp = functools.partial(om.offline_merge, base, method="slerp")
    with pytest.raises(ValueError, match="base with exactly one model, got 2 models"):
        slerp([a, b], t=0.5)
    with pytest.raises(ValueError, match="'slerp' needs t"):
        slerp([a])
    with pytest.raises(ValueError, match="does not use weights"):
        slerp([a], t=0.5, weights=[1.0])
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\], got t = 1\.5"):
        slerp([a], t=1.5)


def test_models_that_do_not_match_are_named():
    base, a = models(2)
    linear = functools.partial(om.offline_merge, weights=[1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"models\[1\]: b has shape \(2,\), base has shape \(11,\)"
    ):
        linear(base, [a, a | {"b": jnp.ones(2)}])
    without_b = {k: v for k, v in a.items() if k != "b"}
    with pytest.raises(ValueError, match=r"models\[0\]: b is missing.*models\[1\]: head is not in"):
        linear(base, [without_b, a | {"head": jnp.ones(2)}])
    with pytest.raises(ValueError, match=r"models\[1\]: b is int32, base has float32"):
        linear(base, [a, a | {"b": jnp.arange(11)}])
    with pytest.raises(ValueError, match="at least one model, got 0"):
        om.offline_merge(base, [], weights=[])
    z = {"z": jnp.ones(2, jnp.complex64)}
    with pytest.raises(ValueError, match="z is complex64; only method 'linear'"):
        om.offline_merge(z, [z], method="ties", weights=[1.0])
