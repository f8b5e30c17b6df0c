"""The objectives that a step differentiates: a model's log-probabilities put into a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train import losses
from train.accumulate import Parted
from train.logps import completion_statistics
from train.pairs import pair_token_logps
from train.step import Batch, LossFn, Metrics

VocabChunk = int | None | Literal["auto"]

AUTO_VOCAB_CHUNK = 8192
"""Columns of the vocabulary that `vocab_chunk="auto"` holds at a time."""


def resolve_vocab_chunk(vocab_chunk: VocabChunk, vocab_size: int) -> int | None:
    """The chunk that a setting means for a vocabulary.

    `"auto"` computes all logits at once up to `2 * AUTO_VOCAB_CHUNK` tokens, where they are no
    larger than the other activations, and `AUTO_VOCAB_CHUNK` columns at a time above: a third more
    work in the output projection buys that no `[batch, length, vocabulary]` array exists. On a CPU
    that is faster too (49k tokens, 1024 positions, width 576: 3.0 s instead of 5.4 s with the
    gradient), because a chunk stays near the caches.
    """
    if vocab_chunk != "auto":
        return vocab_chunk
    return AUTO_VOCAB_CHUNK if vocab_size > 2 * AUTO_VOCAB_CHUNK else None


def _pair_token_logps(model: Any, batch: Batch, vocab_chunk: VocabChunk) -> jax.Array:
    """Per-token logps of both completions, `[2 * batch, completion]`, from one forward pass."""
    chunk = resolve_vocab_chunk(vocab_chunk, model.unembedding().shape[1])
    return pair_token_logps(model, batch, vocab_chunk=chunk)


def preference_loss(
    graphdef: nnx.GraphDef,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    vocab_chunk: VocabChunk = "auto",
) -> LossFn:
    """A DPO-family loss on preference batches with cached reference log-probabilities.

    Args:
      graphdef: The model's structure, from `train.models.split_model`.
      loss_type: A name in `train.losses.LOSSES`.
      beta: Strength of the pull towards the reference model.
      label_smoothing: Probability that a label is flipped; only for `"sigmoid"`.
      vocab_chunk: See `resolve_vocab_chunk`.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)`: the mean loss over the pairs, float32, and
      `loss` and the metrics of `losses.pair_metrics`. `batch` holds `prompt_tokens`, `prompt_mask`
      `[B, P]`, `chosen_tokens`, `chosen_mask`, `rejected_tokens`, `rejected_mask` `[B, C]`,
      `reference_chosen_logps` and `reference_rejected_logps` `[B]`.

    Raises:
      ValueError: For an unknown loss or a setting out of range, before anything is traced.
    """
    loss_of_pair = losses.pair_loss(loss_type, beta=beta, label_smoothing=label_smoothing)

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        logps = _pair_token_logps(nnx.merge(graphdef, params), batch, vocab_chunk)
        chosen, rejected = jnp.split(jnp.sum(logps, axis=1), 2)
        pair = losses.PairLogps(
            chosen,
            rejected,
            batch["reference_chosen_logps"],
            batch["reference_rejected_logps"],
            jnp.sum(batch["chosen_mask"], axis=1, dtype=jnp.float32),
            jnp.sum(batch["rejected_mask"], axis=1, dtype=jnp.float32),
        )
        loss = jnp.mean(loss_of_pair(pair))
        return loss, {"loss": jax.lax.stop_gradient(loss), **losses.pair_metrics(pair, beta)}

    return loss_fn


def sft_loss(graphdef: nnx.GraphDef, *, vocab_chunk: VocabChunk = "auto") -> LossFn:
    """Cross-entropy on the completion tokens of SFT batches, averaged over the batch's tokens.

    Args:
      graphdef: The model's structure, from `train.models.split_model`.
      vocab_chunk: See `resolve_vocab_chunk`.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)` with the metrics of `losses.sft`. `batch` holds
      `prompt_tokens`, `prompt_mask` `[B, P]`, `completion_tokens` and `completion_mask` `[B, C]`.
    """

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        model = nnx.merge(graphdef, params)
        mask = batch["completion_mask"]
        logps, top1 = completion_statistics(
            model,
            batch["prompt_tokens"],
            batch["prompt_mask"],
            batch["completion_tokens"],
            mask,
            vocab_chunk=resolve_vocab_chunk(vocab_chunk, model.unembedding().shape[1]),
        )
        return losses.sft(logps, mask, top1)

    def masses(batch: Batch) -> dict[str, jax.Array]:
        tokens = jnp.sum(batch["completion_mask"], dtype=jnp.float32)
        return {"loss": tokens, "mean_token_accuracy": tokens}

    return Parted(loss_fn, masses=masses, sums=("num_tokens",))


def reference_logps_fn(
    graphdef: nnx.GraphDef, *, vocab_chunk: VocabChunk = "auto"
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted `f(params, batch) -> (chosen_logps, rejected_logps)`, each float32 `[B]`.

    It scores a batch exactly as `preference_loss` does, so a policy that has not moved has rewards
    of zero. `batch` needs no reference log-probabilities.
    """

    @jax.jit
    def reference_logps(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logps = _pair_token_logps(nnx.merge(graphdef, params), batch, vocab_chunk)
        chosen, rejected = jnp.split(jnp.sum(logps, axis=1), 2)
        return chosen, rejected

    return reference_logps


def check_starts_at_reference(
    metrics: Mapping[str, Any],
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    tolerance: float = 1e-2,
) -> None:
    """Refuse a preference run whose policy is not the reference it is compared with.

    Before the first update every reward is 0 and the loss is the one of a zero margin: ln 2 for
    `sigmoid`, `1 / (4 β²)` for `ipo`, 1 for `hinge`. Anything else means that the cached reference
    log-probabilities belong to another model, other data or another template.

    Args:
      metrics: Metrics of the first step of a fresh run, or of an evaluation before it.
      loss_type: The loss that made them.
      beta: Its beta.
      tolerance: Largest deviation of a mean reward from 0, and of the loss relative to its
        expected value. The default leaves room for bfloat16.

    Raises:
      ValueError: Naming every figure that is off.
    """
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    pair = losses.PairLogps(*map(jnp.asarray, (zero, zero, zero, zero, one, one)))
    expected = float(losses.pair_loss(loss_type, beta=beta)(pair)[0])
    wrong = [
        f"{name} = {float(metrics[name]):.6g} instead of 0"
        for name in ("rewards/chosen", "rewards/rejected")
        if not abs(float(metrics[name])) <= tolerance
    ]
    loss = float(metrics["loss"])
    if not math.isclose(loss, expected, rel_tol=tolerance):
        wrong.insert(0, f"loss = {loss:.6g} instead of {expected:.6g}")
    if wrong:
        raise ValueError(
            f"The policy does not start at the reference model: {'; '.join(wrong)}. The reference "
            "log-probabilities were computed with another model, another data set or another "
            "tokenisation; delete the cached ones and start again."
        )
