"""From rewards to advantages: each answer against the other answers to its prompt.

As in TRL 1.16 (`GRPOTrainer._generate_and_score_completions`). NumPy in float64, on the host: the
numbers are few, and every process works on those of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Scale = Literal["group", "batch", "none"]

_SMALL = 1e-4
_ZERO = 1e-8


def weighted_rewards(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """One reward an answer: the weighted sum of those that apply to it.

    In ``scores`` ``[..., rewards]`` a reward that does not apply is NaN; so is the sum ``[...]`` where
    none applies.
    """
    total = np.nansum(scores * np.asarray(weights), axis=-1)
    return np.where(np.isnan(scores).all(axis=-1), np.nan, total)


def advantages(rewards: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Rewards less the mean of their group, divided by a standard deviation.

    Args:
        rewards: ``[prompts, answers]``, NaN where an answer has none.
        scale: ``group`` divides by the deviation of the group (DeepSeekMath, arXiv:2402.03300),
            ``batch`` by that of all rewards (arXiv:2508.08221), ``none`` by nothing (Dr. GRPO,
            arXiv:2503.20783).

    Returns:
        The advantages, float64 ``[prompts, answers]``, 0 where an answer has no reward; and whether
        the deviation is 0, bool of the same shape: that of the group, or with ``batch`` of the batch.

    Example:
        >>> advantages(np.array([[1.0, 0.0], [2.0, 2.0]]), "none")[0].tolist()
        [[0.5, -0.5], [0.0, 0.0]]
    """
    # A = (r − mean of the group) / (standard deviation + 1e-4)
    found = rewards - nan_mean(rewards, axis=1)
    spread = nan_std(rewards, axis=None if scale == "batch" else 1)
    if scale != "none":
        found = found / (spread + _SMALL)
    return np.nan_to_num(found), np.broadcast_to(np.abs(spread) <= _ZERO, rewards.shape)


def advantages_per_reward(
    scores: np.ndarray, weights: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Every reward against its group by itself, and their weighted sum against the batch.

    A reward that varies little then counts as much as one that varies a lot (GDPO, arXiv:2601.05242).
    ``scores`` are ``[prompts, answers, rewards]``, NaN where a reward does not apply.

    Returns:
        The advantages, float64 ``[prompts, answers]``, 0 where an answer has no reward; and whether
        all sums are the same, bool of the same shape.
    """
    # A_k = (r_k − mean) / (std + 1e-4) in each group, then (Σ w_k A_k − mean) / (std + 1e-4)
    each = (scores - nan_mean(scores, axis=1)) / (nan_std(scores, axis=1) + _SMALL)
    each = np.where(np.isnan(scores), np.nan, np.nan_to_num(each))
    total = weighted_rewards(each, weights)
    spread = nan_std(total)
    found = (total - nan_mean(total)) / (spread + _SMALL)
    return np.nan_to_num(found), np.broadcast_to(np.abs(spread) <= _ZERO, total.shape)


def nan_mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The mean of what is not NaN, with that axis of length 1, if any; NaN of nothing."""
    keep = axis is not None
    count = np.sum(~np.isnan(values), axis=axis, keepdims=keep)
    total = np.nansum(values, axis=axis, keepdims=keep)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def nan_std(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The standard deviation (n − 1) of what is not NaN, shaped like `nan_mean`; NaN of one."""
    keep = axis is not None
    count = np.sum(~np.isnan(values), axis=axis, keepdims=keep)
    squares = np.nansum(np.square(values - nan_mean(values, axis)), axis=axis, keepdims=keep)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)
