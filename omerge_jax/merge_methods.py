"""How the methods of ``offline_merge`` merge one leaf."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import Axes, Path, from_front, show, to_front
from omerge_jax.sparsifiers.band import band
from omerge_jax.sparsifiers.base import (
    Sparsifier,
    SparsifyContext,
    check_density,
    identity,
    norm_ratio,
)
from omerge_jax.sparsifiers.magnitude import magnitude
from omerge_jax.sparsifiers.random import random
from omerge_jax.sparsifiers.ranked import magnitude_ranked, rank_axis_of
from omerge_jax.threshold.edge import per_layer

_RESCALE = ("inverse", "norm", "none")
_ELECTIONS = ("weighted", "unweighted", "count")
_PER_MODEL = ("density", "epsilon", "gamma")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of all the trees: its path, its arrays, and which axes stack layers."""

    path: Path
    base: Any
    models: tuple[Any, ...]
    axes: Axes

    @property
    def layer_axes(self) -> int:
        """How many axes stack layers; they are in front where a leaf is merged."""
        return len(self.axes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A method with every setting that it uses; ``density``, ``epsilon``, ``gamma`` per model."""

    method: "Method"
    models: int
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge of one leaf, the sparsifier of its deltas, and the settings it uses with defaults."""

    merge: Callable[[Plan, Leaf, jax.Array, list[jax.Array]], jax.Array]
    defaults: Mapping[str, Any]
    sparsifier: Callable[[Mapping[str, Any], int], Sparsifier] = lambda *_: identity()


def make_plan(name: str, models: int, given: Mapping[str, Any]) -> Plan:
    """Returns the plan of a merge.

    Args:
      name: the method.
      models: how many models there are.
      given: the settings that the caller gave.

    Raises:
      ValueError: names the setting, what was found and what is wanted.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got method = {name!r}")
    method = METHODS[name]
    wanted = "exactly one model" if method.merge is _slerp else "at least one model"
    if models < 1 or (method.merge is _slerp and models != 1):
        raise ValueError(f"method {name!r} merges base with {wanted}, got {models} models")
    for key, value in given.items():
        if key not in method.defaults:
            raise ValueError(
                f"method {name!r} does not use {key}, got {key} = {value!r}; leave it out. It uses "
                f"{', '.join(method.defaults)}"
            )
    settings = {**method.defaults, **given}
    for key, value in settings.items():
        if value is _REQUIRED:
            raise ValueError(f"method {name!r} needs {key}, got none")
        _check(name, key, value, method.defaults)
        if key in _PER_MODEL:
            settings[key] = _per_model(key, value, models)
    plan = Plan(method, models, settings)
    for index in range(models):
        own = _settings_of(plan, index)
        check_density(own.get("density", 1.0))
        method.sparsifier(own, 1)
    return plan


def _check(method: str, key: str, value: Any, defaults: Mapping[str, Any]) -> None:
    allowed: tuple[Any, ...] = ()
    if key == "rescale":
        # A share that is not drawn has no probability to divide by.
        allowed = _RESCALE if "seed" in defaults else _RESCALE[1:]
    elif key == "election":
        allowed = _ELECTIONS
    elif key == "normalize":
        allowed = (True, False)
    if allowed and value not in allowed:
        options = ", ".join(map(repr, allowed))
        raise ValueError(f"{key} of method {method!r} must be one of {options}, got {value!r}")
    if key == "scale" and isinstance(value, (int, float)) and not math.isfinite(value):
        raise ValueError(f"scale must be finite, got scale = {value}")


def _per_model(key: str, value: Any, models: int) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * models
    if len(values) != models:
        raise ValueError(f"{key} needs one entry a model, got {len(values)} for {models} models")
    return values


def _settings_of(plan: Plan, index: int) -> dict[str, Any]:
    return {k: v[index] if k in _PER_MODEL else v for k, v in plan.settings.items()}


def weights_at(plan: Plan, path: Path) -> list[Any]:
    """Returns one weight a model for the leaf at ``path``: for slerp, its ``t``.

    Raises:
      ValueError: a wrong number of weights, weights that are not finite or cannot be normalized, or
        a ``t`` outside [0, 1].
    """
    key = "t" if "t" in plan.settings else "weights"
    value: Any = plan.settings[key]
    where = f" for the leaf {show(path)}" if callable(value) else ""
    value = value(path) if callable(value) else value
    if key == "t":
        if isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ValueError(f"t must be between 0 and 1, got t = {value}{where}")
        return [value]
    weights = list(value)
    if len(weights) != plan.models:
        raise ValueError(
            f"weights needs one entry a model, got {len(weights)} for {plan.models} models{where}"
        )
    if all(isinstance(weight, (int, float)) for weight in weights):
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"weights must be finite, got weights = {weights}{where}")
        if plan.method.merge is _linear and plan.settings["normalize"] and sum(weights) == 0:
            raise ValueError(
                f"linear weights must not sum to 0, got weights = {weights}{where}; change them or "
                "take normalize=False"
            )
    return weights


def check_leaf(plan: Plan, leaf: Leaf) -> None:
    """Raises ValueError where the settings do not fit the leaf."""
    weights_at(plan, leaf.path)
    if "rank_axis" in plan.settings:
        axis, shape = plan.settings["rank_axis"], jnp.shape(leaf.base)
        rank_axis_of(axis, shape, leaf.layer_axes, leaf.path)
    dtype = jnp.result_type(leaf.base, *leaf.models)
    if jnp.issubdtype(dtype, jnp.complexfloating) and plan.method.merge is not _linear:
        raise ValueError(
            f"{show(leaf.path)} is {dtype}; only method 'linear' merges complex leaves"
        )


def merge_leaf(plan: Plan, leaf: Leaf) -> jax.Array:
    """Merges one leaf; the result has the dtype of ``leaf.base``."""
    arrays = [jnp.asarray(array) for array in (leaf.base, *leaf.models)]
    wide = wide_dtype(jnp.result_type(*arrays))
    origin, *others = (to_front(array.astype(wide), leaf.axes) for array in arrays)
    merged = plan.method.merge(plan, leaf, origin, others)
    return from_front(merged, leaf.axes).astype(arrays[0].dtype)


def _linear(plan: Plan, leaf: Leaf, origin: jax.Array, others: list[jax.Array]) -> jax.Array:
    weights = [jnp.asarray(w, origin.dtype) for w in weights_at(plan, leaf.path)]
    total = _sum([w * other for w, other in zip(weights, others, strict=True)])
    return total / _sum(weights) if plan.settings["normalize"] else total


def _task_vectors(plan: Plan, leaf: Leaf, origin: jax.Array, others: list[jax.Array]) -> jax.Array:
    weights = [jnp.asarray(w, origin.dtype) for w in weights_at(plan, leaf.path)]
    deltas = [_sparsified(plan, leaf, i, other - origin) for i, other in enumerate(others)]
    terms = [w * delta for w, delta in zip(weights, deltas, strict=True)]
    if "election" in plan.settings:
        enters = _have_elected_sign(deltas, terms, plan.settings["election"])
        terms = [jnp.where(enter, term, 0) for enter, term in zip(enters, terms, strict=True)]
        divisor = _sum([jnp.where(enter, w, 0) for enter, w in zip(enters, weights, strict=True)])
        divisor = jnp.where(divisor == 0, 1, divisor)
    else:
        divisor = _sum(weights)
        divisor = jnp.where(jnp.abs(divisor) < 1e-8, 1, divisor)
    total = _sum(terms)
    total = total / divisor if plan.settings["normalize"] else total
    return origin + plan.settings["scale"] * total


def _sparsified(plan: Plan, leaf: Leaf, index: int, delta: jax.Array) -> jax.Array:
    ctx = SparsifyContext(jnp.int32(0), leaf.path, f"model{index}", leaf.layer_axes)
    entries = math.prod(delta.shape[leaf.layer_axes :])
    kept = plan.method.sparsifier(_settings_of(plan, index), entries)(delta, ctx)
    # Here, not in the sparsifiers: `random` has the online authors' own variant of it.
    if plan.settings.get("rescale") == "norm":
        kept = kept * per_layer(norm_ratio(delta, kept, leaf.layer_axes, 0.0), delta)
    return kept


def _have_elected_sign(
    deltas: list[jax.Array], terms: list[jax.Array], election: str
) -> list[jax.Array]:
    votes = deltas if election == "unweighted" else terms
    ballot = _sum([jnp.sign(vote) for vote in votes] if election == "count" else votes)
    positive = ballot >= 0
    # An entry that was dropped, or is 0, must not count in the divisor.
    return [(vote != 0) & ((vote > 0) == positive) for vote in votes]


def _slerp(plan: Plan, leaf: Leaf, origin: jax.Array, others: list[jax.Array]) -> jax.Array:
    (other,) = others
    (t,) = weights_at(plan, leaf.path)
    t = jnp.asarray(t, origin.dtype)
    axes = tuple(range(leaf.layer_axes, origin.ndim))

    def unit(x: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(x * x, axes, keepdims=True))
        return x / jnp.where(norm > 1e-8, norm, 1)

    cosine = jnp.sum(unit(origin) * unit(other), axes, keepdims=True)
    # The sine in the denominator vanishes there.
    parallel = jnp.abs(cosine) > 0.9995
    angle = jnp.arccos(jnp.where(parallel, 0, cosine))
    ours = jnp.where(parallel, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
    theirs = jnp.where(parallel, t, jnp.sin(t * angle) / jnp.sin(angle))
    return ours * origin + theirs * other


def _sum(values: Sequence[Any]) -> Any:
    return sum(values[1:], start=values[0])


def _magnitude(settings: Mapping[str, Any], entries: int) -> Sparsifier:
    density = settings["density"]
    # Where `magnitude` would leave a small tensor dense, mergekit keeps its largest entry.
    least = min(1.0, 1.5 / max(entries, 1))
    number = isinstance(density, (int, float))
    return magnitude(max(density, least) if number else jnp.maximum(density, least))


def _drawn(settings: Mapping[str, Any]) -> dict[str, Any]:
    rescale = "none" if settings["rescale"] == "norm" else settings["rescale"]
    return {"rescale": rescale, "seed": settings["seed"], "draw": settings["draw"]}


def _random(settings: Mapping[str, Any], entries: int) -> Sparsifier:
    return random(settings["density"], clip=None, **_drawn(settings))


def _ranked(settings: Mapping[str, Any], entries: int) -> Sparsifier:
    ranks = {"epsilon": settings["epsilon"], "axis": settings["rank_axis"]}
    return magnitude_ranked(settings["density"], **ranks, **_drawn(settings))


def _band(settings: Mapping[str, Any], entries: int) -> Sparsifier:
    return band(settings["density"], gamma=settings["gamma"])


_REQUIRED: Any = object()
_TASK = {"weights": _REQUIRED, "normalize": False, "scale": 1.0}
_SPARSE = {**_TASK, "density": 1.0, "rescale": "none"}
_DARE = {**_SPARSE, "rescale": "norm", "seed": 0, "draw": None}
_DELLA = {**_DARE, "epsilon": 0.15, "rank_axis": -1}
_CRUMBS = {**_SPARSE, "gamma": 0.01}
_ELECT = {"election": "weighted"}
_MEAN = {"normalize": True}

METHODS = {
    "linear": Method(_linear, {"weights": _REQUIRED, **_MEAN}),
    "task_arithmetic": Method(_task_vectors, _TASK),
    "ties": Method(_task_vectors, {**_SPARSE, **_ELECT, **_MEAN}, _magnitude),
    "dare_linear": Method(_task_vectors, _DARE, _random),
    "dare_ties": Method(_task_vectors, {**_DARE, **_ELECT}, _random),
    "della_linear": Method(_task_vectors, _DELLA, _ranked),
    "della": Method(_task_vectors, {**_DELLA, **_ELECT, **_MEAN}, _ranked),
    "breadcrumbs": Method(_task_vectors, _CRUMBS, _band),
    "breadcrumbs_ties": Method(_task_vectors, {**_CRUMBS, **_ELECT}, _band),
    "slerp": Method(_slerp, {"t": _REQUIRED}),
}
