"""Metrics of a whole data set: batches of one shape, exact means over the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import track

from train.data import TokenDataset
from train.losses import PairLogps, pair_loss, pair_metrics
from train.sharding import put_batch
from train.step import LossFn

Evaluate = Callable[[Any], dict[str, float]]
Score = Callable[[Any, Any], tuple[jax.Array, jax.Array]]


def fixed_batches(dataset: TokenDataset, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All rows in order, in batches of one shape.

    The last batch is filled up with copies of its first row whose answers are masked, so that they
    add no token; whoever reads rows takes the first ``len(dataset)`` of all.
    """
    for start in range(0, len(dataset), batch_size):
        rows = np.arange(start, min(start + batch_size, len(dataset)))
        missing = batch_size - len(rows)
        filled = np.concatenate([rows, np.repeat(rows[:1], missing)])
        batch = {name: column[filled] for name, column in dataset.arrays.items()}
        for name in batch:
            if missing and name.endswith("_mask") and name != "prompt_mask":
                batch[name][-missing:] = False
        yield batch


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
        score: From `train.step.reference_logps_fn`.
        params: Of the model that scores.
        dataset: Preferences.
        batch_size: Pairs scored at once.
        mesh: Where batches go.
        shown_as: Label of a progress bar; None for none.
    """
    batches = fixed_batches(dataset, batch_size)
    if shown_as is not None:
        total = -(-len(dataset) // batch_size)
        batches = track(batches, description=shown_as, total=total)
    scored = [jax.device_get(score(params, put_batch(batch, mesh))) for batch in batches]
    chosen, rejected = (np.concatenate(part)[: len(dataset)] for part in zip(*scored, strict=True))
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
        score: From `train.step.reference_logps_fn`.
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
        loss_fn: From `train.step.sft_loss`.
        dataset: Held-out rows.
        batch_size: Rows scored at once.
        mesh: Where batches go.
    """
    measure = jax.jit(lambda params, batch: loss_fn(params, batch)[1])

    def evaluate(params: Any) -> dict[str, float]:
        rows = [
            jax.device_get(measure(params, put_batch(batch, mesh)))
            for batch in fixed_batches(dataset, batch_size)
        ]
        tokens = np.array([row["num_tokens"] for row in rows], np.float64)
        return {
            f"eval_{name}": float(tokens @ [row[name] for row in rows] / tokens.sum())
            for name in ("loss", "mean_token_accuracy")
        }

    return evaluate
