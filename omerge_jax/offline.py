"""One-shot merges of parameter trees after training: the baseline of online merging."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import leaves_by_path, path_names, show

_METHODS = ("linear", "task_arithmetic")


def offline_merge(
    base: Any, models: Sequence[Any], *, method: str = "linear", weights: Sequence[float]
) -> Any:
    """Merges models into one.

    Args:
      base: parameters of the common base; gives the structure and dtypes of the result. ``"linear"``
        takes nothing else from it.
      models: parameter trees with the same leaves as ``base``, in any containers.
      method: ``"linear"``: Σ wᵢ·θᵢ ÷ Σ wᵢ. ``"task_arithmetic"``: θ_b + Σ wᵢ·(θᵢ − θ_b).
      weights: one weight a model.

    Returns:
      A pytree like ``base``; integer leaves are those of ``base``. Computed in float32 at least.

    Raises:
      ValueError: an unknown method, a wrong number of weights, linear weights that sum to 0, or
        models whose leaves are missing or of another shape.

    Example:
      >>> merged = offline_merge({"w": jnp.zeros(1)}, [{"w": jnp.ones(1)}, {"w": jnp.full(1, 3.0)}],
      ...                        weights=[1.0, 1.0])
      >>> merged["w"].tolist()
      [2.0]

    References:
      Wortsman et al., Model Soups, https://arxiv.org/abs/2203.05482; Ilharco et al., Editing Models
      with Task Arithmetic, https://arxiv.org/abs/2212.04089.
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got method = {method!r}")
    if len(weights) != len(models) or not models:
        raise ValueError(
            f"weights needs one entry a model, got {len(weights)} for {len(models)} models"
        )
    if method == "linear" and sum(weights) == 0:
        raise ValueError(f"linear weights must not sum to 0, got weights = {list(weights)}")
    others = [leaves_by_path(model) for model in models]

    def merge(key_path: tuple[Any, ...], leaf: Any) -> jax.Array:
        path = path_names(key_path)
        ours = jnp.asarray(leaf)
        leaves = [_matching(other, path, ours, i) for i, other in enumerate(others)]
        if not jnp.issubdtype(ours.dtype, jnp.inexact):
            return ours
        wide = wide_dtype(ours.dtype)
        origin = ours.astype(wide) if method == "task_arithmetic" else jnp.zeros([], wide)
        terms = [w * (t.astype(wide) - origin) for w, t in zip(weights, leaves, strict=True)]
        total = sum(terms[1:], terms[0])
        merged = origin + total if method == "task_arithmetic" else total / sum(weights)
        return merged.astype(ours.dtype)

    return jax.tree_util.tree_map_with_path(merge, base)


def _matching(
    leaves: dict[tuple[str, ...], Any], path: tuple[str, ...], ours: jax.Array, index: int
) -> jax.Array:
    leaf = leaves.get(path)
    if leaf is None or jnp.shape(leaf) != ours.shape:
        found = "is missing" if leaf is None else f"has shape {jnp.shape(leaf)}"
        raise ValueError(
            f"models[{index}]: {show(path)} {found}, base has shape {ours.shape}; only models of one "
            "architecture can be merged"
        )
    return jnp.asarray(leaf)
