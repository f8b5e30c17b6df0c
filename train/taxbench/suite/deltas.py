"""Deltas to merge in place of the reference's: parts of it, and controls that have nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import omerge_jax as om
from train.models import layer_axes
from train.taxbench.suite.recipes import DeltaKind

LOW_RANK = 4


def make_delta(kind: DeltaKind, base: Any, sft: Any, earlier: Any, seed: int) -> Any:
    """Makes the delta that a recipe asks for, a tree like ``sft``.

    Args:
        kind: ``tau``: the fine-tuned less the base model. ``negative``: its negative. ``permuted``:
            its entries in random order within every tensor. ``random``: normal numbers with the norm
            of every tensor. ``earlier``: the model half-way through fine-tuning less the base.
            ``low_rank``: the closest matrices of rank 4, vectors whole. ``attention``, ``mlp``: the
            entries of those blocks, 0 elsewhere.
        base: parameters before fine-tuning.
        sft: parameters after it.
        earlier: parameters half-way through it.
        seed: of the random kinds.
    """
    tau = om.task_vector(earlier if kind == "earlier" else sft, base)
    rng = np.random.default_rng([seed, 7])
    match kind:
        case "tau" | "earlier":
            return tau
        case "negative":
            return jax.tree.map(jnp.negative, tau)
        case "permuted":
            return _by_tensor(tau, lambda x: rng.permutation(x.ravel()).reshape(x.shape))
        case "random":
            return _by_tensor(tau, lambda x: _as_long(rng.standard_normal(x.shape), x))
        case "low_rank":
            return _by_tensor(tau, _low_rank)
        case "attention" | "mlp":
            part = "self_attn" if kind == "attention" else "mlp"
            return jax.tree_util.tree_map_with_path(
                lambda path, x: x if part in _names(path) else jnp.zeros_like(x), tau
            )


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _by_tensor(tree: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Applies `change` to every tensor, one layer of stacked ones at a time."""

    def leaf(path: Any, x: Any) -> Any:
        array = np.asarray(x)
        tensors = array if layer_axes(_names(path)) else array[None]
        changed = np.stack([change(tensor) for tensor in tensors]).reshape(array.shape)
        return jnp.asarray(changed, array.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _as_long(noise: np.ndarray, x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(noise)
    return noise * (np.linalg.norm(x) / length if length else 0.0)


def _low_rank(x: np.ndarray) -> np.ndarray:
    if x.ndim < 2:
        return x
    matrix = x.reshape(x.shape[0], -1)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = slice(0, LOW_RANK)
    return ((left[:, kept] * values[kept]) @ right[kept]).reshape(x.shape)
