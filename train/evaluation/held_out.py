"""Metrics of a whole data set: batches of one shape, exact means over the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from train.data import TokenDataset, answer_names
from train.data.layout import row_lengths, share_prompt, trim
from train.data.padding import batches_by_length, padded_width
from train.distributed.batches import put_whole
from train.distributed.processes import fetch, is_first
from train.losses import PairLogps, PreferenceLoss, UnpairedLoss
from train.types import Evaluate, LossFn, Score


def bucketed_batches(
    dataset: TokenDataset, batch_size: int, shown_as: str = ""
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields all rows once, those of similar length together, in batches of few shapes.

    Padding that no row of a batch needs is cut off, to a width from `padded_width`. The last batch
    is filled up with copies of its first row whose answers are masked, so that they add no token.
    With each batch come the numbers of its rows, int ``[n]`` with ``n <= batch_size``: they are the
    batch's first ``n``. A progress bar has the label ``shown_as``; without one there is none.
    """
    lengths = row_lengths(dataset.arrays)
    total = lengths.prompt + lengths.scored
    for rows, filled in batches_by_length(total, batch_size, shown_as):
        batch = {name: column[filled] for name, column in dataset.arrays.items()}
        for name in answer_names(batch):
            batch[f"{name}_mask"][len(rows) :] = False
        widths = lengths.widths(rows, padded_width)
        batch = trim(batch, widths)
        yield rows, share_prompt(batch, widths) if dataset.share_prompts else batch


def answer_logps(
    score: Score,
    params: Any,
    dataset: TokenDataset,
    batch_size: int,
    mesh: Mesh | None,
    *,
    shown_as: str = "",
) -> tuple[np.ndarray, ...]:
    """Summed log-probabilities of every kind of answer, each float32 ``[rows]``.

    ``score`` is from `train.objectives.preference.reference_logps_fn` (the chosen and the rejected
    answers) or `train.objectives.unpaired.unpaired_logps_fn`. A progress bar has the label
    ``shown_as``; without one there is none.
    """
    found: list[np.ndarray] = []
    for rows, batch in bucketed_batches(dataset, batch_size, shown_as if is_first() else ""):
        scores = fetch(score(params, put_whole(batch, mesh)))
        found = found or [np.zeros(len(dataset), np.float32) for _ in scores]
        for whole, part in zip(found, scores, strict=True):
            whole[rows] = part[: len(rows)]
    return tuple(found)


def evaluate_preferences(
    score: Score,
    dataset: TokenDataset,
    *,
    batch_size: int,
    mesh: Mesh | None,
    loss: PreferenceLoss,
) -> Evaluate:
    """Makes ``f(params) -> {"eval_loss", "eval_rewards/accuracies", …}`` for preferences.

    ``score`` is from `train.objectives.preference.reference_logps_fn`. Unless the loss is
    reference-free, the data set has `reference_chosen_logps` and `reference_rejected_logps`. A loss
    that compares the pairs of a batch (aot) compares all pairs here.
    """
    arrays, kinds = dataset.arrays, ("chosen", "rejected")
    reference = [np.zeros(len(dataset), np.float32)] * 2
    if loss.needs_reference:
        reference = [arrays[f"reference_{kind}_logps"] for kind in kinds]
    lengths = [arrays[f"{kind}_mask"].sum(axis=1, dtype=np.float32) for kind in kinds]

    def evaluate(params: Any) -> dict[str, float]:
        logps = answer_logps(score, params, dataset, batch_size, mesh)
        pair = PairLogps(*map(jnp.asarray, (*logps, *reference, *lengths)))
        metrics = {"loss": jnp.mean(loss(pair)), **loss.metrics(pair)}
        return {f"eval_{name}": float(value) for name, value in metrics.items()}

    return evaluate


def evaluate_unpaired(
    score: Score,
    dataset: TokenDataset,
    *,
    batch_size: int,
    mesh: Mesh | None,
    loss: UnpairedLoss,
) -> Evaluate:
    """Makes ``f(params) -> {"eval_loss", "eval_kl", "eval_rewards/margins", …}`` for KTO.

    Every figure is of all rows together: the divergence is the mean over all of them, clamped at 0
    after that, and a label's reward the mean over its rows. TRL averages over batches. ``score`` is
    from `train.objectives.unpaired.unpaired_logps_fn`. The data set has labelled answers with
    `reference_completion_logps`, and for `"kto"` the mismatched ones with `reference_kl_logps`.
    """
    arrays = dataset.arrays

    def evaluate(params: Any) -> dict[str, float]:
        logps, *mismatched = answer_logps(score, params, dataset, batch_size, mesh)
        kl = jnp.mean(mismatched[0] - arrays["reference_kl_logps"]) if loss.needs_kl else None
        reference, label = arrays["reference_completion_logps"], arrays["label"]
        per_row, metrics = loss(jnp.asarray(logps), jnp.asarray(reference), jnp.asarray(label), kl)
        metrics = {"loss": jnp.mean(per_row), **metrics}
        found = {f"eval_{name}": float(value) for name, value in metrics.items()}
        # A label that no row has leaves no mean, as in the training loop's log.
        means = ("eval_rewards/", "eval_logps/")
        return {k: v for k, v in found.items() if not (np.isnan(v) and k.startswith(means))}

    return evaluate


def evaluate_sft(
    loss_fn: LossFn, dataset: TokenDataset, *, batch_size: int, mesh: Mesh | None
) -> Evaluate:
    """Makes ``f(params) -> {"eval_loss", "eval_mean_token_accuracy"}``: means over all tokens.

    ``loss_fn`` is from `train.objectives.sft.sft_loss`.
    """
    measure = jax.jit(lambda params, batch: loss_fn(params, batch)[1])

    def evaluate(params: Any) -> dict[str, float]:
        rows = [
            fetch(measure(params, put_whole(batch, mesh)))
            for _, batch in bucketed_batches(dataset, batch_size)
        ]
        tokens = np.array([row["num_tokens"] for row in rows], np.float64)
        return {
            f"eval_{name}": float(tokens @ [row[name] for row in rows] / tokens.sum())
            for name in ("loss", "mean_token_accuracy")
        }

    return evaluate
