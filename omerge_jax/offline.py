"""One-shot merges of parameter trees after training: the baseline of online merging."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from omerge_jax.merge_methods import Leaf, check_leaf, make_plan, merge_leaf
from omerge_jax.paths import LayerAxes, Path, layer_axes_of, leaves_by_path, path_names, show
from omerge_jax.sparsifiers.base import Draw
from omerge_jax.sparsifiers.ranked import RankAxis


def offline_merge(
    base: Any,
    models: Sequence[Any],
    *,
    method: str = "linear",
    weights: Sequence[float] | jax.Array | Callable[[Path], Sequence[float]] | None = None,
    density: float | Sequence[float] | None = None,
    normalize: bool | None = None,
    rescale: Literal["inverse", "norm", "none"] | None = None,
    election: Literal["weighted", "unweighted", "count"] | None = None,
    epsilon: float | Sequence[float] | None = None,
    gamma: float | Sequence[float] | None = None,
    rank_axis: RankAxis = None,
    scale: float | None = None,
    t: float | Callable[[Path], float] | None = None,
    seed: int | jax.Array | None = None,
    draw: Draw | None = None,
    layer_axes: LayerAxes = None,
) -> Any:
    """Merges models into one, as mergekit does, on parameter trees.

    With δᵢ = θᵢ − θ_b, F the method's sparsifier and n the number of models:

    ==================== =============================================== ========= =========
    method               result                                          normalize rescale
    ==================== =============================================== ========= =========
    ``linear``           Σ wᵢ·θᵢ                                         True      —
    ``task_arithmetic``  θ_b + scale · Σ wᵢ·δᵢ                           False     —
    ``ties``             F: largest ``density`` share; sign election     True      ``"none"``
    ``dare_linear``      F: random ``density`` share                     False     ``"norm"``
    ``dare_ties``        F: random ``density`` share; sign election      False     ``"norm"``
    ``della_linear``     F: random, likelier for large entries           False     ``"norm"``
    ``della``            F: random, likelier for large entries; election True      ``"norm"``
    ``breadcrumbs``      F: ``density`` share below the outliers         False     ``"none"``
    ``breadcrumbs_ties`` F: ``density`` share below outliers; election   False     ``"none"``
    ``slerp``            great circle from θ_b to the one model          —         —
    ==================== =============================================== ========= =========

    where F gives θ_b + scale · Σ wᵢ·F(δᵢ), and an election lets only those terms into the sum that have
    the elected sign, entry by entry. The defaults shown are mergekit's. A setting that the method
    does not use is an error.

    Leaves that are one array at several paths of ``base``, and of every model (tied embeddings), are
    merged once, under the first of the paths, and stay one array. Inside ``jax.jit`` two arguments are
    never one array: there, methods that draw masks give tied leaves one mask each.

    The merge is not compiled as a whole; ``jax.jit`` saves memory on large trees. Sharded arrays stay
    where they are; only the sort of the ``della`` methods gathers rows that lie on several devices.

    Args:
      base: parameters θ_b of the common base; gives the structure and dtypes of the result, and all
        integer and boolean leaves. ``"linear"`` takes nothing else from it.
      models: parameter trees with the same leaves as ``base``, in any containers.
      method: one of the table.
      weights: one weight a model, or a callable of a leaf's path that returns them. All but
        ``"slerp"`` need them.
      density: share of entries that F keeps, in (0, 1]; one for all, or one a model. Default 1. Of
        equal magnitudes at the edge of what is kept, a choice spread over the tensor is.
      normalize: divide the sum by Σ wᵢ; after an election, by the sum of the weights of the terms
        that entered it. A sum of 0 divides by 1 (``"linear"`` refuses it).
      rescale: ``"norm"`` gives F(δ) the L1 norm of δ, per tensor; ``"inverse"`` divides what is kept
        by the probability with which it was (``dare``, ``della``; their papers); ``"none"``.
      election: ``"weighted"`` elects the sign of Σ wᵢ·F(δᵢ) (default; mergekit's ``sum``),
        ``"unweighted"`` that of Σ F(δᵢ), ``"count"`` that of most nonzero terms. A draw elects +.
      epsilon: ``della``: half the width of the window of probabilities. Default 0.15; one for all, or
        one a model.
      gamma: ``breadcrumbs``: share of the largest entries dropped. Default 0.01; one for all, or one
        a model.
      rank_axis: ``della``: the axis that a row runs along, see ``axis`` of ``magnitude_ranked``; Flax
        kernels need ``-2``. Default −1; a callable of the path may return None for all axes.
      scale: factor of the merged delta (mergekit's ``lambda``). Default 1.
      t: ``slerp``: share of the way from ``base`` (0) to the model (1), or a callable of the path.
        Tensors that are nearly parallel, or opposite, are interpolated linearly.
      seed: ``dare``, ``della``: fixes the masks, together with path, model and element. Default 0.
      draw: ``dare``, ``della``: another source of masks, ``(x, probability, ctx) -> bool array``;
        ``ctx.path`` is the leaf's path, ``ctx.role`` is ``"model0"``, ``"model1"``, …
      layer_axes: which axes index separate tensors (stacked layers), see `online_merge`. Every method
        accepts it, as it describes the leaves.

    Returns:
      A pytree like ``base``. Computed in float32 at least, whatever the leaves' dtype.

    Raises:
      ValueError: before anything is computed: an unknown method, a setting that it lacks, does not
        use or that is out of range, a wrong number of weights, models whose leaves do not match those
        of ``base`` (missing, left over, of another shape or kind; all are named), or complex leaves
        another method than ``"linear"``.

    Example:
      >>> base, a, b = {"w": jnp.zeros(3)}, {"w": jnp.array([1.0, 4.0, -6.0])}, {"w": jnp.arange(3.0)}
      >>> offline_merge(base, [a, b], weights=[1.0, 1.0])["w"].tolist()
      [0.5, 2.5, -2.0]
      >>> offline_merge(base, [a, b], method="ties", weights=[1.0, 1.0], density=0.7)["w"].tolist()
      [0.0, 2.5, -6.0]

    References:
      Wortsman et al., Model Soups, https://arxiv.org/abs/2203.05482; Ilharco et al., Editing Models
      with Task Arithmetic, https://arxiv.org/abs/2212.04089; Yadav et al., TIES-Merging,
      https://arxiv.org/abs/2306.01708; Yu et al. (DARE), https://arxiv.org/abs/2311.03099; Deep et
      al. (DELLA), https://arxiv.org/abs/2406.11617; Davari and Belilovsky, Model Breadcrumbs,
      https://arxiv.org/abs/2312.06795; Goddard et al., mergekit, https://arxiv.org/abs/2403.13257.
    """
    settings = {
        "weights": weights,
        "density": density,
        "normalize": normalize,
        "rescale": rescale,
        "election": election,
        "epsilon": epsilon,
        "gamma": gamma,
        "rank_axis": rank_axis,
        "scale": scale,
        "t": t,
        "seed": seed,
        "draw": draw,
    }
    plan = make_plan(method, len(models), {k: v for k, v in settings.items() if v is not None})
    leaves = _matched_leaves(base, models, layer_axes)
    for leaf in leaves.values():
        check_leaf(plan, leaf)
    merged: dict[tuple[Any, ...], jax.Array] = {}

    def merge(key_path: tuple[Any, ...], origin: Any) -> jax.Array:
        leaf = leaves.get(path_names(key_path))
        if leaf is None:
            return jnp.asarray(origin)
        key = _identity(leaf)
        if key not in merged:
            merged[key] = merge_leaf(plan, leaf)
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
    problems = [
        problem
        for index, theirs in enumerate(others)
        for path in [*ours, *(path for path in theirs if path not in ours)]
        if (problem := _mismatch(index, path, ours.get(path), theirs.get(path)))
    ]
    if problems:
        raise ValueError(
            f"{'; '.join(problems[:10])}{'; …' if len(problems) > 10 else ''}. Only models of one "
            "architecture can be merged"
        )
    return {
        path: Leaf(
            path,
            leaf,
            tuple(theirs[path] for theirs in others),
            layer_axes_of(layer_axes, path, jnp.ndim(leaf)),
        )
        for path, leaf in ours.items()
        if _is_float(leaf)
    }


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _mismatch(index: int, path: Path, ours: Any, theirs: Any) -> str | None:
    name = f"models[{index}]: {show(path)}"
    if theirs is None:
        return f"{name} is missing, base has shape {jnp.shape(ours)}"
    if ours is None:
        return f"{name} is not in base"
    if jnp.shape(ours) != jnp.shape(theirs):
        return f"{name} has shape {jnp.shape(theirs)}, base has shape {jnp.shape(ours)}"
    if _is_float(ours) != _is_float(theirs):
        return f"{name} is {jnp.result_type(theirs)}, base has {jnp.result_type(ours)}"
    return None
