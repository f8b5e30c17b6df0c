"""Metrics of a whole data set: batches of one shape, exact means over the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import track

from train.data import TokenDataset, Widths, answer_names, row_lengths, share_prompt, trim
from train.losses import PairLogps, pair_loss, pair_metrics
from train.sharding import put_batch
from train.step import LossFn

Evaluate = Callable[[Any], dict[str, float]]
Score = Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def bucketed_batches(
    dataset: TokenDataset, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """All rows once, those of similar length together, in batches of few shapes.

    Padding that no row of a batch needs is cut off, to one of two widths an octave. The last batch
    is filled up with copies of its first row whose answers are masked, so that they add no token.

    Args:
        dataset: Preferences or SFT rows.
        batch_size: Rows in every batch.

    Yields:
        The numbers of the rows, int ``[n]`` with ``n <= batch_size``, and the batch, whose first
        ``n`` rows they are.
    """
    lengths = row_lengths(dataset.arrays)
    total = lengths.prompt + lengths.scored
    order = np.argsort(total, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        missing = batch_size - len(rows)
        filled = np.concatenate([rows, np.repeat(rows[:1], missing)])
        batch = {name: column[filled] for name, column in dataset.arrays.items()}
        for name in answer_names(batch):
            batch[f"{name}_mask"][len(rows) :] = False
        counts = (lengths.prompt, lengths.answer, total, lengths.scored)
        widths = Widths(*(_width(int(count[rows].max())) for count in counts))
        batch = trim(batch, widths)
        yield rows, share_prompt(batch, widths) if dataset.share_prompts else batch


def _width(length: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, 64, 96 … that is not below `length`."""
    power = 8
    while power < length:
        if power * 3 // 2 >= length:
            return power * 3 // 2
        power *= 2
    return power


def pair_logps(
    score: Score,
    params: Any,
    dataset: TokenDataset,
    batch_size: int,
    mesh: Mesh | None,
    *,
    shown_as: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probabilities of the chosen and the rejected answers, each float32 ``[rows]``.

    Args:
        score: From `train.objectives.reference_logps_fn`.
        params: Of the model that scores.
        dataset: Preferences.
        batch_size: Pairs scored at once.
        mesh: Where batches go.
        shown_as: Label of a progress bar; None for none.
    """
    chosen, rejected = np.zeros((2, len(dataset)), np.float32)
    batches = bucketed_batches(dataset, batch_size)
    if shown_as is not None:
        total = -(-len(dataset) // batch_size)
        batches = track(batches, description=shown_as, total=total)
    for rows, batch in batches:
        scores = jax.device_get(score(params, put_batch(batch, mesh)))
        chosen[rows], rejected[rows] = (part[: len(rows)] for part in scores)
    return chosen, rejected


def evaluate_preferences(
    score: Score,
    dataset: TokenDataset,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    batch_size: int,
    mesh: Mesh | None,
) -> Evaluate:
    """Makes ``f(params) -> {"eval_loss", "eval_rewards/accuracies", …}`` for preferences.

    Args:
        score: From `train.objectives.reference_logps_fn`.
        dataset: Preferences with `reference_chosen_logps` and `reference_rejected_logps`.
        loss_type: See `train.losses.pair_loss`, as for the two below.
        beta: Factor of the rewards.
        label_smoothing: Of the loss.
        batch_size: Pairs scored at once.
        mesh: Where batches go.
    """
    loss = pair_loss(loss_type, beta=beta, label_smoothing=label_smoothing)
    arrays = dataset.arrays

    def evaluate(params: Any) -> dict[str, float]:
        chosen, rejected = pair_logps(score, params, dataset, batch_size, mesh)
        pair = PairLogps(
            *map(
                jnp.asarray,
                (
                    chosen,
                    rejected,
                    arrays["reference_chosen_logps"],
                    arrays["reference_rejected_logps"],
                    arrays["chosen_mask"].sum(axis=1, dtype=np.float32),
                    arrays["rejected_mask"].sum(axis=1, dtype=np.float32),
                ),
            )
        )
        metrics = {"loss": jnp.mean(loss(pair)), **pair_metrics(pair, beta)}
        return {f"eval_{name}": float(value) for name, value in metrics.items()}

    return evaluate


def evaluate_sft(
    loss_fn: LossFn, dataset: TokenDataset, *, batch_size: int, mesh: Mesh | None
) -> Evaluate:
    """Makes ``f(params) -> {"eval_loss", "eval_mean_token_accuracy"}``: means over all tokens.

    Args:
        loss_fn: From `train.objectives.sft_loss`.
        dataset: Held-out rows.
        batch_size: Rows scored at once.
        mesh: Where batches go.
    """
    measure = jax.jit(lambda params, batch: loss_fn(params, batch)[1])

    def evaluate(params: Any) -> dict[str, float]:
        rows = [
            jax.device_get(measure(params, put_batch(batch, mesh)))
            for _, batch in bucketed_batches(dataset, batch_size)
        ]
        tokens = np.array([row["num_tokens"] for row in rows], np.float64)
        return {
            f"eval_{name}": float(tokens @ [row[name] for row in rows] / tokens.sum())
            for name in ("loss", "mean_token_accuracy")
        }

    return evaluate
