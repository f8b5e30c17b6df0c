"""The merge of parameter trees: leaves are matched by path and merged one by one."""

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from omerge_jax.offline.methods import Leaf, MergeSettings, make_plan
from omerge_jax.paths import LayerAxes, Path, layer_axes_of, leaves_by_path, path_names, show


def offline_merge(
    base: Any,
    models: Sequence[Any],
    *,
    method: str = "linear",
    layer_axes: LayerAxes = None,
    **settings: Unpack[MergeSettings],
) -> Any:
    """Merges models into one, as mergekit does, on parameter trees.

    `omerge_jax.offline` has the formulas of the methods and their papers.

    Args:
      base: parameters θ_b of the common base; gives the structure and dtypes of the result, and all
        integer and boolean leaves. ``"linear"`` takes nothing else from it.
      models: parameter trees with the same leaves as ``base``, in any containers.
      method: linear, task_arithmetic, ties, dare_linear, dare_ties, della_linear, della, breadcrumbs,
        breadcrumbs_ties or slerp.
      layer_axes: which axes index separate tensors (stacked layers), see `online_merge`.
      **settings: ``weights``, ``density``, ``seed`` and others, see `MergeSettings`; None for what the
        method has by default. A setting that the method does not use is an error.

    Returns:
      A pytree like ``base``. Computed in float32 at least, whatever the leaves' dtype.

    Raises:
      ValueError: before anything is computed: an unknown method, a setting that it lacks, does not use
        or that is out of range, models whose leaves are not those of ``base`` (all are named), complex
        leaves or shards of leaves with another method than ``"linear"``.

    Example:
      >>> base, a, b = {"w": jnp.zeros(3)}, {"w": jnp.array([1.0, 4.0, -6.0])}, {"w": jnp.arange(3.0)}
      >>> offline_merge(base, [a, b], weights=[1.0, 1.0])["w"].tolist()
      [0.5, 2.5, -2.0]
      >>> offline_merge(base, [a, b], method="ties", weights=[1.0, 1.0], density=0.7)["w"].tolist()
      [0.0, 2.5, -6.0]
    """
    plan = make_plan(method, len(models), {k: v for k, v in settings.items() if v is not None})
    leaves = _matched_leaves(base, models, layer_axes)
    for leaf in leaves.values():
        plan.check(leaf)
    merged: dict[Any, jax.Array] = {}

    def merge(key_path: tuple[Any, ...], origin: Any) -> jax.Array:
        leaf = leaves.get(path_names(key_path))
        if leaf is None:
            return jnp.asarray(origin)
        key = _identity(leaf)
        if key not in merged:
            merged[key] = plan.merge(leaf)
        return merged[key]

    return jax.tree_util.tree_map_with_path(merge, base)


def _identity(leaf: Leaf) -> tuple[Any, ...]:
    """What tells leaves that are the same arrays in all trees from others."""
    arrays = (leaf.base, *leaf.models)
    if all(isinstance(array, (jax.Array, np.ndarray)) for array in arrays):
        return tuple(id(array) for array in arrays)
    return leaf.path


def _matched_leaves(base: Any, models: Sequence[Any], layer_axes: LayerAxes) -> dict[Path, Leaf]:
    """Returns the float leaves of ``base`` with those of the models."""
    ours = leaves_by_path(base)
    others = [leaves_by_path(model) for model in models]
    found = [
        _mismatch(f"models[{index}]: {show(path)}", ours.get(path), theirs.get(path))
        for index, theirs in enumerate(others)
        for path in dict.fromkeys([*ours, *theirs])
    ]
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise ValueError(
            f"{'; '.join(problems[:10])}{'; …' if len(problems) > 10 else ''}. Only models of one "
            "architecture can be merged"
        )

    def match(path: Path, leaf: Any) -> Leaf:
        axes = layer_axes_of(layer_axes, path, jnp.ndim(leaf))
        return Leaf(path, leaf, tuple(theirs[path] for theirs in others), axes)

    return {path: match(path, leaf) for path, leaf in ours.items() if _is_inexact(leaf)}


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _mismatch(name: str, ours: Any, theirs: Any) -> str | None:
    if theirs is None:
        return f"{name} is missing, base has shape {jnp.shape(ours)}"
    if ours is None:
        return f"{name} is not in base"
    if jnp.shape(ours) != jnp.shape(theirs):
        return f"{name} has shape {jnp.shape(theirs)}, base has shape {jnp.shape(ours)}"
    if _is_inexact(ours) != _is_inexact(theirs):
        return f"{name} is {jnp.result_type(theirs)}, base has {jnp.result_type(ours)}"
    return None
