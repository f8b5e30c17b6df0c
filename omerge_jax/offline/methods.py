"""The methods of ``offline_merge``: which settings each uses, and how it merges one leaf."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp

from omerge_jax.checks import check_number, check_whole, known
from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import Axes, Path, from_front, show, to_front
from omerge_jax.sparsifiers.band import band
from omerge_jax.sparsifiers.base import (
    Draw,
    Sparsifier,
    SparsifyContext,
    check_density,
    identity,
    norm_ratio,
)
from omerge_jax.sparsifiers.magnitude import magnitude
from omerge_jax.sparsifiers.random import random
from omerge_jax.sparsifiers.ranked import RankAxis, magnitude_ranked, rank_axis_of
from omerge_jax.threshold.edge import per_layer

_RESCALE = ("inverse", "norm", "none")
_PER_MODEL = ("density", "epsilon", "gamma")
Settings = Mapping[str, Any]


class MergeSettings(TypedDict, total=False):
    """Settings of `offline_merge`; each method uses some of them.

    Attributes:
      weights: one weight a model, or a callable of a leaf's path that returns them. All methods but
        ``slerp`` need them.
      density: share of entries that F keeps, in (0, 1]; one for all, or one a model. Default 1. Of
        equal magnitudes at the edge of what is kept, a choice spread over the tensor is.
      normalize: divide the sum by Σ wᵢ; after an election, by the sum of the weights of the terms that
        entered it. A sum of 0 divides by 1 (``linear`` refuses it).
      rescale: ``"norm"`` gives F(δ) the L1 norm of δ, per tensor; ``"inverse"`` divides what is kept by
        the probability with which it was (``dare``, ``della``; their papers); ``"none"``.
      election: ``"weighted"`` elects the sign of Σ wᵢ·F(δᵢ) (default; mergekit's ``sum``),
        ``"unweighted"`` that of Σ F(δᵢ), ``"count"`` that of most nonzero terms. A draw elects +.
      epsilon: ``della``: half the width of the window of probabilities. Default 0.15; one for all, or
        one a model.
      gamma: ``breadcrumbs``: share of the largest entries dropped. Default 0.01; one for all, or one a
        model.
      rank_axis: ``della``: the axis that a row runs along, see ``axis`` of `magnitude_ranked`; Flax
        kernels need ``-2``. Default −1; a callable of the path may return None for all axes.
      scale: factor of the merged delta (mergekit's ``lambda``). Default 1.
      t: ``slerp``: share of the way from ``base`` (0) to the model (1), or a callable of the path.
        Tensors that are nearly parallel, or opposite, are interpolated linearly.
      seed: ``dare``, ``della``: fixes the masks, together with path, model and element. Default 0.
      draw: ``dare``, ``della``: another source of masks, ``(x, probability, ctx) -> bool array``;
        ``ctx.path`` is the leaf's path, ``ctx.role`` is ``"model0"``, ``"model1"``, …
    """

    weights: Sequence[float] | jax.Array | Callable[[Path], Sequence[float]] | None
    density: float | Sequence[float] | None
    normalize: bool | None
    rescale: Literal["inverse", "norm", "none"] | None
    election: Literal["weighted", "unweighted", "count"] | None
    epsilon: float | Sequence[float] | None
    gamma: float | Sequence[float] | None
    rank_axis: RankAxis
    scale: float | None
    t: float | Callable[[Path], float] | None
    seed: int | jax.Array | None
    draw: Draw | None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of all the trees: its path, its arrays, and which axes stack layers.

    Those axes are in front where the leaf is merged.
    """

    path: Path
    base: Any
    models: tuple[Any, ...]
    axes: Axes


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge of one leaf, the settings it uses with defaults, and the sparsifier of its deltas."""

    merge: Callable[["Plan", Leaf, jax.Array, list[jax.Array]], jax.Array]
    defaults: Settings
    sparsifier: Callable[[Settings, int], Sparsifier] = lambda *_: identity()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A method with every setting that it uses; ``density``, ``epsilon``, ``gamma`` per model."""

    method: Method
    settings: Settings

    def merge(self, leaf: Leaf) -> jax.Array:
        """Merges one leaf; the result has the dtype of ``leaf.base``."""
        arrays = [jnp.asarray(array) for array in (leaf.base, *leaf.models)]
        wide = wide_dtype(*(array.dtype for array in arrays))
        origin, *others = (to_front(array.astype(wide), leaf.axes) for array in arrays)
        merged = self.method.merge(self, leaf, origin, others)
        return from_front(merged, leaf.axes).astype(arrays[0].dtype)

    def check(self, leaf: Leaf) -> None:
        """Raises ValueError where the settings do not fit the leaf."""
        self.weights(leaf)
        if "rank_axis" in self.settings:
            shape = jnp.shape(leaf.base)
            rank_axis_of(self.settings["rank_axis"], shape, len(leaf.axes), leaf.path)
        if self.method.merge is _linear:
            return
        for array in (leaf.base, *leaf.models):
            check_whole(leaf.path, array)
            dtype = jnp.result_type(array)
            if jnp.issubdtype(dtype, jnp.complexfloating):
                raise ValueError(
                    f"{show(leaf.path)} is {dtype}; only method 'linear' merges complex leaves"
                )

    def of_model(self, index: int) -> Settings:
        """Returns the settings for one of the models."""
        return {k: v[index] if k in _PER_MODEL else v for k, v in self.settings.items()}

    def weights(self, leaf: Leaf) -> list[Any]:
        """Returns one weight a model for a leaf: for slerp, its ``t``.

        Raises:
          ValueError: a wrong number of weights, weights that are not finite or cannot be normalized,
            or a ``t`` outside [0, 1].
        """
        key = "t" if "t" in self.settings else "weights"
        value: Any = self.settings[key]
        name = f"{key} for the leaf {show(leaf.path)}" if callable(value) else key
        value = value(leaf.path) if callable(value) else value
        if key == "t":
            check_number(name, value, "in [0, 1]")
            return [value]
        weights = list(value)
        if len(weights) != len(leaf.models):
            raise ValueError(
                f"{name} must be one a model, got {len(weights)} for {len(leaf.models)} models"
            )
        for weight in weights:
            check_number(name, weight, "finite")
        numbers = [known(weight) for weight in weights]
        divides = self.method.merge is _linear and self.settings["normalize"]
        if divides and None not in numbers and sum(map(float, weights)) == 0:
            raise ValueError(
                f"{name} must not sum to 0 with method 'linear', got {weights}; change them or take "
                "normalize=False"
            )
        return weights


def make_plan(name: str, models: int, given: Settings) -> Plan:
    """Returns the plan of a merge of so many models by a method with the settings that are given.

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
    # What is not drawn has no probability to divide by.
    rescale = _RESCALE if "seed" in method.defaults else _RESCALE[1:]
    choices = {"rescale": rescale, "normalize": (True, False)}
    choices["election"] = ("weighted", "unweighted", "count")
    settings = {**method.defaults, **given}
    for key, value in settings.items():
        if value is _REQUIRED:
            raise ValueError(f"method {name!r} needs {key}, got none")
        if key in choices and value not in choices[key]:
            options = ", ".join(map(repr, choices[key]))
            raise ValueError(f"{key} of method {name!r} must be one of {options}, got {value!r}")
        if key == "scale":
            check_number(key, value, "finite")
        if key in _PER_MODEL:
            values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * models
            if len(values) != models:
                raise ValueError(
                    f"{key} needs one entry a model, got {len(values)} for {models} models"
                )
            settings[key] = values
    plan = Plan(method, settings)
    for own in map(plan.of_model, range(models)):
        check_density(own.get("density", 1.0))
        method.sparsifier(own, 1)
    return plan


def _linear(plan: Plan, leaf: Leaf, origin: jax.Array, others: list[jax.Array]) -> jax.Array:
    weights = [jnp.asarray(w, origin.dtype) for w in plan.weights(leaf)]
    total = _sum([w * other for w, other in zip(weights, others, strict=True)])
    return total / _sum(weights) if plan.settings["normalize"] else total


def _task_vectors(plan: Plan, leaf: Leaf, origin: jax.Array, others: list[jax.Array]) -> jax.Array:
    weights = [jnp.asarray(w, origin.dtype) for w in plan.weights(leaf)]
    deltas = [_sparsified(plan, leaf, i, other - origin) for i, other in enumerate(others)]
    terms = [w * delta for w, delta in zip(weights, deltas, strict=True)]
    if "election" in plan.settings:
        election = plan.settings["election"]
        votes = deltas if election == "unweighted" else terms
        positive = _sum([jnp.sign(v) for v in votes] if election == "count" else votes) >= 0
        # An entry that was dropped, or is 0, must not count in the divisor.
        enters = [(vote != 0) & ((vote > 0) == positive) for vote in votes]
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
    ctx = SparsifyContext(jnp.int32(0), leaf.path, f"model{index}", len(leaf.axes))
    entries = math.prod(delta.shape[len(leaf.axes) :])
    kept = plan.method.sparsifier(plan.of_model(index), entries)(delta, ctx)
    # Here, not in the sparsifiers: `random` has the online authors' own variant of it.
    if plan.settings.get("rescale") == "norm":
        kept = kept * per_layer(norm_ratio(delta, kept, len(leaf.axes), 0.0), delta)
    return kept


def _slerp(plan: Plan, leaf: Leaf, origin: jax.Array, others: list[jax.Array]) -> jax.Array:
    (other,) = others
    (t,) = plan.weights(leaf)
    t = jnp.asarray(t, origin.dtype)
    axes = tuple(range(len(leaf.axes), origin.ndim))

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


def _magnitude(settings: Settings, entries: int) -> Sparsifier:
    density = settings["density"]
    # Where `magnitude` would leave a small tensor dense, mergekit keeps its largest entry.
    least = min(1.0, 1.5 / max(entries, 1))
    number = isinstance(density, (int, float))
    return magnitude(max(density, least) if number else jnp.maximum(density, least))


def _drawn(settings: Settings) -> dict[str, Any]:
    rescale = "none" if settings["rescale"] == "norm" else settings["rescale"]
    return {"rescale": rescale, "seed": settings["seed"], "draw": settings["draw"]}


def _random(settings: Settings, entries: int) -> Sparsifier:
    return random(settings["density"], clip=None, **_drawn(settings))


def _ranked(settings: Settings, entries: int) -> Sparsifier:
    ranks = {"epsilon": settings["epsilon"], "axis": settings["rank_axis"]}
    return magnitude_ranked(settings["density"], **ranks, **_drawn(settings))


def _band(settings: Settings, entries: int) -> Sparsifier:
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
