"""From prompts to groups of scored answers: what a GRPO step learns from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.data.padding import padded_width
from train.distributed.batches import own_rows, row_numbers
from train.on_policy.advantages import (
    Scale,
    advantages,
    advantages_per_reward,
    nan_mean,
    nan_std,
    weighted_rewards,
)
from train.on_policy.rollouts import OnPolicy, Sampled
from train.types import Batch, Params, Prepared, Score


@dataclass(frozen=True)
class GroupBatches:
    """Makes batches of groups of answers.

    Attributes:
        policy: Samples and scores; its reward gives ``[answers, rewards]``.
        answers: Number of answers to a prompt.
        names: Names of the rewards, which have the ``weights``.
        scale: See `train.on_policy.advantages.advantages`; for "each", `advantages_per_reward`.
        score: From `train.objectives.group.sampled_logps_fn`, and `OnPolicy.replicated`.
        keeps_old: Whether batches are learned from more than once.
        masks_truncated: Whether answers that have not ended are left out of the loss.
    """

    policy: OnPolicy
    answers: int
    names: Sequence[str]
    weights: Sequence[float]
    scale: Scale | Literal["each"]
    score: Score
    keeps_old: bool = False
    masks_truncated: bool = False

    def batch(
        self, params: Params, reference: Params | None, prompts: Batch, step: int
    ) -> Prepared:
        """The batch of a step, and metrics of its answers.

        ``reference`` is None where the loss needs none; ``prompts`` are a batch of
        `train.data.tokenize_prompts`; the draws depend on ``step``, the number of steps done.

        Returns:
            The columns that `train.objectives.group.group_loss` reads, with the answers to prompt
            ``i`` in the rows from ``answers * i`` on, no wider than the longest needs (rounded up by
            `padded_width`); and TRL's metrics of answers and rewards, over the prompts of all
            processes.
        """
        count = len(prompts["index"])
        given = {**prompts, "number": row_numbers(count, self.policy.mesh)}
        found = self.policy.sample(params, given, step, copies=self.answers)
        # From all first answers, all second ones, … to those of a prompt side by side.
        order = np.arange(self.answers * count).reshape(self.answers, count).T
        figures = np.column_stack([found.scores, found.mask.sum(axis=1), found.ended])[order]
        of_all = self.policy.of_all_processes(figures).astype(np.float64)
        scores, lengths, ended = of_all[..., :-2], of_all[..., -2], of_all[..., -1] > 0
        gained, metrics = self._compared(scores)
        width = padded_width(int(lengths.max()))
        columns = self._columns(prompts, found, order.reshape(-1), width)
        mine = own_rows(gained, self.policy.mesh).reshape(-1)
        columns["advantages"] = mine.astype(np.float32)
        # These log-probabilities stay fixed while the batch is learned from.
        models = {"old_logps": params if self.keeps_old else None, "reference_logps": reference}
        fixed: dict[str, np.ndarray] = {}
        for name, model in models.items():
            if model is not None:
                fixed |= self.policy.columns(self.score, model, columns, [name])
        return columns | fixed, metrics | length_metrics(lengths, ended)

    def _compared(self, scores: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """The advantages ``[prompts, answers]``, and metrics of the rewards."""
        rewards = weighted_rewards(scores, self.weights)
        if np.isnan(rewards).any():  # Python shows a warning once
            warnings.warn(
                "every reward function returned None for some answers; they have an advantage of 0.",
                stacklevel=2,
            )
        if self.scale == "each":
            gained, flat = advantages_per_reward(scores, self.weights)
        else:
            gained, flat = advantages(rewards, self.scale)
        metrics = {"reward": float(nan_mean(rewards)), "reward_std": float(nan_std(rewards))}
        for number, name in enumerate(self.names):
            metrics[f"rewards/{name}/mean"] = float(nan_mean(scores[..., number]))
            metrics[f"rewards/{name}/std"] = float(nan_std(scores[..., number]))
        return gained, metrics | {"frac_reward_zero_std": float(flat.mean())}

    def _columns(
        self, prompts: Batch, found: Sampled, rows: np.ndarray, width: int
    ) -> dict[str, np.ndarray]:
        """Prompts and answers, the latter in the order of `rows` and cut to a width."""
        mask = found.mask[rows, :width]
        if self.masks_truncated:
            mask = mask & found.ended[rows][:, None]
        names = ("prompt_tokens", "prompt_mask")
        return {
            **{name: np.repeat(prompts[name], self.answers, axis=0) for name in names},
            "completion_tokens": found.tokens[rows, :width],
            "completion_mask": mask,
        }

    def figures(self, found: Sampled) -> dict[str, np.ndarray]:
        """The figures to report of held-out answers, each ``[answers]``."""
        scores = found.scores
        return {
            "reward": weighted_rewards(scores, self.weights),
            **{f"rewards/{name}/mean": scores[:, i] for i, name in enumerate(self.names)},
            "completions/mean_length": found.mask.sum(axis=1),
            "completions/clipped_ratio": ~found.ended,
        }


def length_metrics(lengths: np.ndarray, ended: np.ndarray) -> dict[str, float]:
    """TRL's metrics of the lengths of all answers and of those that have ended; 0 where none has.

    Example:
        >>> length_metrics(np.array([4.0, 8.0]), np.array([True, False]))["completions/clipped_ratio"]
        0.5
    """
    whole = lengths[ended] if ended.any() else np.zeros(1)
    found = {
        f"completions/{name}_{kind}length": float(measure(values))
        for kind, values in (("", lengths), ("terminated_", whole))
        for name, measure in (("mean", np.mean), ("min", np.min), ("max", np.max))
    }
    return {**found, "completions/clipped_ratio": float(1 - ended.mean())}
