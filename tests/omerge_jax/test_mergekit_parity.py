"""Offline merges equal mergekit's own, to 1e-6, with the same uniform draws behind both masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import omerge_jax as om

REASON = "mergekit is not installed; `pip install --no-deps mergekit==0.1.5` is enough"
merge_methods = pytest.importorskip("mergekit.merge_methods", reason=REASON)
torch = pytest.importorskip("torch")
task_arithmetic = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")

# Tensors as a PyTorch state dict has them: weights are [out, in].
SHAPES = {"embed": (40, 12), "proj": (12, 33), "norm": (12,), "bias": ()}


def trees(count, spread=1e-2):
    """One base and models around it, with a buffer of integers."""
    rng = np.random.default_rng(5)
    base = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    moved = [
        {k: v + spread * rng.normal(size=v.shape) for k, v in base.items()} for _ in range(count)
    ]
    return [
        {k: np.asarray(v, np.float32) for k, v in tree.items()} | {"position": np.arange(7)}
        for tree in (base, *moved)
    ]


def uniforms(name, model):
    rng = np.random.default_rng([*name.encode(), model])
    return np.asarray(rng.uniform(size=SHAPES[name]), np.float32)


def draw(x, probability, ctx):
    number = int(ctx.role.removeprefix("model"))
    return jnp.asarray(uniforms(ctx.path[0], number)) < probability


def by_mergekit(monkeypatch, method, models, parameters, base=0, **dtypes):
    """Runs mergekit on state dicts; its Bernoulli draws come from `uniforms`, in its order."""
    state_dicts = [{k: torch.from_numpy(np.array(v)) for k, v in tree.items()} for tree in models]
    densities = np.broadcast_to(parameters.get("density", 1.0), len(models) - 1)
    drawn = iter(
        uniforms({"head": "embed"}.get(name, name), model)
        for name in models[0]
        if name != "position"
        for model, density in enumerate(densities)
        if density < 1
    )

    def bernoulli(probability):
        return torch.from_numpy(next(drawn)).reshape(probability.shape).lt(probability).float()

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    merged = merge_methods.merge_state_dicts(
        state_dicts, method, parameters=parameters, base=base, **dtypes
    )
    return {name: tensor.float().numpy() for name, tensor in merged.items()}


def ours(models, **settings):
    base, *others = (jax.tree.map(jnp.asarray, tree) for tree in models)
    return om.offline_merge(base, others, **settings)


def check(merged, expected, models):
    assert merged.keys() == expected.keys()
    assert merged["position"].tolist() == models[0]["position"].tolist()
    for name in expected:
        np.testing.assert_allclose(merged[name], expected[name], rtol=0, atol=1e-6, err_msg=name)
    assert np.abs(expected["embed"] - models[0]["embed"]).max() > 1e-3


NAMES = {"lambda": "scale", "weight": "weights"}
THREE = {"weight": [0.5, 0.3, -0.4]}
CASES = [
    ("task_arithmetic", THREE),
    ("task_arithmetic", {**THREE, "normalize": True, "lambda": 0.6}),
    ("task_arithmetic", {"weight": [0.5, -0.5, 0.0], "normalize": True}),
    ("ties", THREE),
    ("ties", {**THREE, "density": 0.3}),
    ("ties", {**THREE, "density": [0.01, 0.5, 0.9], "normalize": False, "lambda": 1.7}),
    ("ties", {"weight": [1.0, 1.0, 1.0], "density": 0.5, "rescale": True}),
    ("dare_linear", {**THREE, "density": 0.4}),
    ("dare_linear", {**THREE, "density": [0.2, 0.5, 1.0], "rescale": False}),
    ("dare_ties", {**THREE, "density": 0.6}),
    ("dare_ties", {**THREE, "density": 0.6, "normalize": True, "rescale": False}),
    ("della", {**THREE, "density": 0.5}),
    ("della", {**THREE, "density": [0.4, 0.5, 0.6], "epsilon": [0.1, 0.3, 0.05]}),
    ("della_linear", {**THREE, "density": 0.7, "epsilon": 0.2, "rescale": False}),
    ("breadcrumbs", {**THREE, "density": 0.5}),
    ("breadcrumbs", {**THREE, "density": 0.9, "gamma": 0.3}),
    ("breadcrumbs_ties", {**THREE, "density": [0.3, 0.6, 0.9], "gamma": [0.0, 0.05, 0.1]}),
    ("breadcrumbs_ties", {**THREE, "density": 0.7, "gamma": 0.1, "rescale": True}),
]


@pytest.mark.parametrize(("method", "parameters"), CASES)
def test_task_vector_methods(monkeypatch, method, parameters):
    models = trees(3)
    if method.startswith("della"):
        # mergekit ranks a row of one entry as 0/0 and then cannot draw.
        models = [{k: v for k, v in t.items() if k != "bias"} for t in models]
    expected = by_mergekit(monkeypatch, method, models, parameters)
    settings = {NAMES.get(name, name): value for name, value in parameters.items()}
    if "rescale" in settings:
        settings["rescale"] = "norm" if settings["rescale"] else "none"
    if method.startswith("d"):
        settings["draw"] = draw
    check(ours(models, method=method, **settings), expected, models)


def test_an_election_by_count(monkeypatch):
    method = task_arithmetic.GeneralizedTaskArithmeticMerge(
        consensus_method=task_arithmetic.ConsensusMethod.count,
        sparsification_method=task_arithmetic.SparsificationMethod.magnitude,
        default_normalize=True,
        default_rescale=False,
        method_name="ties_count",
        method_pretty_name=None,
        method_reference_url=None,
    )
    models, parameters = trees(3), {"weight": [1.0, 0.1, 0.2], "density": 0.7}
    expected = by_mergekit(monkeypatch, method, models, parameters)
    how = {"weights": parameters["weight"], "density": 0.7}
    merged = ours(models, method="ties", election="count", **how)
    check(merged, expected, models)
    by_weight = ours(models, method="ties", **how)
    assert (np.abs(by_weight["embed"] - merged["embed"]) > 1e-3).any()


@pytest.mark.parametrize(("weights", "normalize"), [([0.5, 0.7], True), ([0.5, -0.2], False)])
def test_linear(monkeypatch, weights, normalize):
    base, *models = trees(2)
    parameters = {"weight": weights, "normalize": normalize}
    expected = by_mergekit(monkeypatch, "linear", models, parameters, base=None)
    merged = ours([base, *models], method="linear", weights=weights, normalize=normalize)
    check(merged, expected, [base])


@pytest.mark.parametrize("t", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("spread", [1e-2, 1.0])
def test_slerp(monkeypatch, t, spread):
    """Near models take the linear branch, far ones the great circle."""
    models = trees(1, spread)
    expected = by_mergekit(monkeypatch, "slerp", models, {"t": t})
    merged = ours(models, method="slerp", t=t)
    for name in expected:
        np.testing.assert_allclose(merged[name], expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_tied_embeddings(monkeypatch):
    """One array at two paths stays one; mergekit merges the two names from the same draws."""
    models = [tree | {"head": tree["embed"]} for tree in trees(2)]
    how = {"weight": [0.5, 0.7], "density": 0.6}
    expected = by_mergekit(monkeypatch, "dare_ties", models, how)
    base, *others = models
    settings = {"weights": how["weight"], "density": 0.6, "draw": draw}
    merged = om.offline_merge(base, others, method="dare_ties", **settings)
    check(merged, expected, models)
    assert merged["head"] is merged["embed"]


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp"])
def test_bfloat16_computed_in_float32(monkeypatch, method):
    """As mergekit does when it is given the same values in float32."""
    models = trees(2)
    halves = [
        {k: jnp.asarray(v, jnp.bfloat16 if k != "position" else None) for k, v in tree.items()}
        for tree in (models[:2] if method == "slerp" else models)
    ]
    wide = [{k: np.asarray(v, np.float32) for k, v in t.items() if k != "position"} for t in halves]
    own = {"t": 0.3} if method == "slerp" else {"weight": [0.5, 0.7]}
    # The deltas have so many equal magnitudes that which of them TIES keeps is anyone's choice.
    own |= {"density": 0.5} if method == "dare_ties" else {}
    used = wide[1:] if method == "linear" else wide
    expected = by_mergekit(
        monkeypatch,
        method,
        used,
        own,
        base=None if method == "linear" else 0,
        out_dtype=torch.bfloat16,
    )
    settings = {NAMES.get(name, name): value for name, value in own.items()}
    merged = ours(halves, method=method, **settings, **({"draw": draw} if "dare" in method else {}))
    for name in expected:
        assert merged[name].dtype == jnp.bfloat16
        difference = np.abs(np.asarray(merged[name], np.float32) - expected[name])
        # A sum rounded otherwise in float32 may land on the next bfloat16.
        assert (difference <= np.abs(expected[name]) * 2**-7).all()
        assert (difference == 0).mean() > 0.98
