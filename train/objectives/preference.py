"""The objectives that a step differentiates: a model's log-probabilities put into a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from train import losses
from train.data import is_packed
from train.objectives.accumulate import NORMALIZERS, Parted
from train.objectives.logps import completion_logps, completion_statistics
from train.objectives.packed_logps import packed_statistics
from train.objectives.pair_logps import pair_token_logps
from train.training.step import Batch, LossFn, Metrics

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


def _pair_logps(
    model: Any, batch: Batch, vocab_chunk: VocabChunk, ld_alpha: float | None
) -> tuple[jax.Array, jax.Array]:
    """Summed logps of the chosen and the rejected answers, each `[batch]`, from one forward pass."""
    masks = batch["chosen_mask"], batch["rejected_mask"]
    chunk = resolve_vocab_chunk(vocab_chunk, model.unembedding().shape[1])
    logps = pair_token_logps(model, batch, vocab_chunk=chunk)
    other = jnp.concatenate(masks[::-1])
    sums = losses.weigh_tail(logps, jnp.concatenate(masks), other, ld_alpha)
    chosen, rejected = jnp.split(sums, 2)
    return chosen, rejected


def _completion_sums(
    model: Any, batch: Batch, vocab_chunk: VocabChunk, name: str = "completion"
) -> jax.Array:
    """Summed logps of one kind of answer, `[batch]`."""
    logps = completion_logps(
        model,
        batch["prompt_tokens"],
        batch["prompt_mask"],
        batch[f"{name}_tokens"],
        batch[f"{name}_mask"],
        vocab_chunk=resolve_vocab_chunk(vocab_chunk, model.unembedding().shape[1]),
    )
    return jnp.sum(logps, axis=1)


def _beta_of(batch: Batch, beta_at: losses.BetaAt | None) -> tuple[jax.Array | None, Metrics]:
    """β of this step and what is logged of it; None for the loss's own."""
    if beta_at is None:
        return None, {}
    beta = beta_at(batch["step"])
    return beta, {"beta": beta}


def preference_loss(
    graphdef: nnx.GraphDef,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    beta: float = 0.1,
    beta_at: losses.BetaAt | None = None,
    vocab_chunk: VocabChunk = "auto",
    **settings: Any,
) -> Parted:
    """A loss on preference batches, with cached reference log-probabilities where it has any.

    Args:
      graphdef: The model's structure, from `train.models.split_model`.
      loss_type: A name in `train.losses.LOSSES`, or several to be added up.
      beta: Strength of the pull towards the reference model.
      beta_at: β of every step, from `train.losses.beta_schedule`, in place of `beta`.
      vocab_chunk: See `resolve_vocab_chunk`.
      settings: `weights`, `label_smoothing` and the others of `train.losses.pair_loss`.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)`: the mean loss over the pairs, float32, and
      `loss` and the metrics of `losses.PairLoss.metrics`, with `beta` where it changes. `batch`
      holds `prompt_tokens`, `prompt_mask` `[B, P]`, `chosen_tokens`, `chosen_mask`,
      `rejected_tokens`, `rejected_mask` `[B, C]`; `reference_chosen_logps` and
      `reference_rejected_logps` `[B]` unless the loss is reference-free; and with `beta_at` the
      number of updates done, `step` int32 `[]`, which `train.training.step.make_train_step` adds.
      It says how it follows from parts of a batch: the cross-entropy in `sft` and `orpo` is a mean
      over tokens.

    Raises:
      ValueError: For an unknown loss or a setting out of range, before anything is traced.
    """
    loss_of = losses.pair_loss(loss_type, beta=beta, **settings)

    def loss_fn(params: Any, batch: Batch) -> tuple[Metrics, Metrics]:
        model = nnx.merge(graphdef, params)
        chosen, rejected = _pair_logps(model, batch, vocab_chunk, loss_of.ld_alpha)
        zero = jnp.zeros_like(chosen)
        with_reference = loss_of.needs_reference
        pair = losses.PairLogps(
            chosen,
            rejected,
            batch["reference_chosen_logps"] if with_reference else zero,
            batch["reference_rejected_logps"] if with_reference else zero,
            jnp.sum(batch["chosen_mask"], axis=1, dtype=jnp.float32),
            jnp.sum(batch["rejected_mask"], axis=1, dtype=jnp.float32),
        )
        now, logged = _beta_of(batch, beta_at)
        terms = {"pairs": jnp.mean(loss_of.of_pairs(pair, now))}
        if loss_of.nll_weight:
            terms["nll"] = loss_of.nll_weight * loss_of.nll(pair)
        loss = jax.lax.stop_gradient(sum(terms.values(), start=jnp.float32(0)))
        return terms, {"loss": loss, **loss_of.metrics(pair, now), **logged}

    def masses(batch: Batch) -> Metrics:
        return dict.fromkeys(("nll", "nll_loss"), jnp.sum(batch["chosen_mask"], dtype=jnp.float32))

    return Parted(loss_fn, masses=masses)


def unpaired_loss(
    graphdef: nnx.GraphDef,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    beta_at: losses.BetaAt | None = None,
    vocab_chunk: VocabChunk = "auto",
    **settings: float,
) -> LossFn:
    """KTO or APO-zero on batches of labelled answers with cached reference log-probabilities.

    The divergence is estimated on mismatched completions that the batch brings along
    (`train.data.mismatched`): the mean over the whole batch, on all devices together, of their
    log-ratios, clamped at 0 after that. No gradient passes through it, so that forward pass keeps
    nothing.

    Args:
      graphdef: The model's structure, from `train.models.split_model`.
      loss_type: A name in `train.losses.UNPAIRED_LOSSES`.
      beta: Strength of the pull towards the reference model.
      beta_at: β of every step, from `train.losses.beta_schedule`, in place of `beta`.
      vocab_chunk: See `resolve_vocab_chunk`.
      settings: `desirable_weight` and `undesirable_weight`, see `train.losses.unpaired_loss`.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)`: the mean loss, and `loss` and the metrics of
      `losses.kto`. `batch` holds `prompt_tokens`, `prompt_mask` `[B, P]`, `completion_tokens`,
      `completion_mask` `[B, C]`, `label` bool `[B]`, `reference_completion_logps` `[B]`, for `kto`
      `kl_tokens`, `kl_mask` `[B, C]` and `reference_kl_logps` `[B]`, and with `beta_at` `step`.

    Raises:
      ValueError: For an unknown loss or a setting out of range, before anything is traced.
    """
    loss_of = losses.unpaired_loss(loss_type, beta=beta, **settings)

    def divergence(params: Any, batch: Batch) -> Metrics:
        frozen = nnx.merge(graphdef, jax.lax.stop_gradient(params))
        mismatched = _completion_sums(frozen, batch, vocab_chunk, "kl")
        return {"kl": jnp.mean(mismatched - batch["reference_kl_logps"])}

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        kl = batch[NORMALIZERS]["kl"] if loss_of.needs_kl else None
        logps = _completion_sums(nnx.merge(graphdef, params), batch, vocab_chunk)
        now, logged = _beta_of(batch, beta_at)
        reference, label = batch["reference_completion_logps"], batch["label"]
        per_row, metrics = loss_of(logps, reference, label, kl, now)
        loss = jnp.mean(per_row)
        return loss, {"loss": jax.lax.stop_gradient(loss), **metrics, **logged}

    def masses(batch: Batch) -> Metrics:
        desirable = jnp.sum(batch["label"], dtype=jnp.float32)
        others = jnp.sum(~batch["label"], dtype=jnp.float32)
        return {
            f"{value}/{name}": count
            for value in ("rewards", "logps")
            for name, count in (("chosen", desirable), ("rejected", others))
        }

    def margin(metrics: Mapping[str, jax.Array]) -> Metrics:
        return {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}

    return Parted(
        loss_fn,
        masses=masses,
        normalizers=divergence if loss_of.needs_kl else None,
        derived=margin,
    )


def sft_loss(graphdef: nnx.GraphDef, *, vocab_chunk: VocabChunk = "auto") -> LossFn:
    """Cross-entropy on the completion tokens of SFT batches, averaged over the batch's tokens.

    Args:
      graphdef: The model's structure, from `train.models.split_model`.
      vocab_chunk: See `resolve_vocab_chunk`.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)` with the metrics of `losses.sft`. `batch` holds
      `prompt_tokens`, `prompt_mask` `[B, P]`, `completion_tokens` and `completion_mask` `[B, C]`, or
      several examples a row in the columns of `train.data.packing.pack`.
    """

    def scored(batch: Batch) -> jax.Array:
        return batch["packed_from"] >= 0 if is_packed(batch) else batch["completion_mask"]

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        model = nnx.merge(graphdef, params)
        chunk = resolve_vocab_chunk(vocab_chunk, model.unembedding().shape[1])
        if is_packed(batch):
            logps, top1 = packed_statistics(model, batch, vocab_chunk=chunk)
        else:
            logps, top1 = completion_statistics(
                model,
                batch["prompt_tokens"],
                batch["prompt_mask"],
                batch["completion_tokens"],
                batch["completion_mask"],
                vocab_chunk=chunk,
            )
        return losses.sft(logps, scored(batch), top1)

    def masses(batch: Batch) -> dict[str, jax.Array]:
        tokens = jnp.sum(scored(batch), dtype=jnp.float32)
        return {"loss": tokens, "mean_token_accuracy": tokens}

    return Parted(loss_fn, masses=masses, sums=("num_tokens",))


def reference_logps_fn(
    graphdef: nnx.GraphDef, *, vocab_chunk: VocabChunk = "auto", ld_alpha: float | None = None
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted `f(params, batch) -> (chosen_logps, rejected_logps)`, each float32 `[B]`.

    It scores a batch exactly as `preference_loss` does, so a policy that has not moved has rewards
    of zero. `batch` needs no reference log-probabilities.
    """

    @jax.jit
    def reference_logps(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return _pair_logps(nnx.merge(graphdef, params), batch, vocab_chunk, ld_alpha)

    return reference_logps


def unpaired_logps_fn(
    graphdef: nnx.GraphDef, names: Sequence[str], *, vocab_chunk: VocabChunk = "auto"
) -> Callable[[Any, Batch], tuple[jax.Array, ...]]:
    """A jitted `f(params, batch)` that scores answers as `unpaired_loss` does.

    Args:
      graphdef: The model's structure.
      names: Kinds of answers: `"completion"`, and `"kl"` for the mismatched ones.
      vocab_chunk: See `resolve_vocab_chunk`.

    Returns:
      A function whose result has float32 `[B]` for every name.
    """

    @jax.jit
    def logps(params: Any, batch: Batch) -> tuple[jax.Array, ...]:
        model = nnx.merge(graphdef, params)
        return tuple(_completion_sums(model, batch, vocab_chunk, name) for name in names)

    return logps


def check_starts_at_reference(
    metrics: Mapping[str, Any],
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    beta: float = 0.1,
    tolerance: float = 1e-2,
    **settings: Any,
) -> None:
    """Refuse a preference run whose policy is not the reference it is compared with.

    Before the first update every reward is 0 and the loss is the one of a zero margin: ln 2 for
    `sigmoid`, `1 / (4 β²)` for `ipo`, 1 for `hinge`. Anything else means that the cached reference
    log-probabilities belong to another model, other data or another template. A loss without a
    reference has nothing to check, and one that is mixed with cross-entropy has only its rewards.

    Args:
      metrics: Metrics of the first step of a fresh run, or of an evaluation before it.
      loss_type: The loss that made them.
      beta: Its beta.
      tolerance: Largest deviation of a mean reward from 0, and of the loss relative to its
        expected value. The default leaves room for bfloat16.
      settings: The loss's other settings, see `train.losses.pair_loss`.

    Raises:
      ValueError: Naming every figure that is off.
    """
    loss_of = losses.pair_loss(loss_type, beta=beta, **settings)
    if loss_of.needs_reference:
        _check_start(metrics, loss_of.at_reference(), tolerance)


def check_unpaired_start(
    metrics: Mapping[str, Any], *, beta: float, tolerance: float = 1e-2
) -> None:
    """`check_starts_at_reference` for KTO, where β times the divergence is 0 as well."""
    _check_start({**metrics, "kl": beta * float(metrics["kl"])}, None, tolerance)


def _check_start(metrics: Mapping[str, Any], expected: float | None, tolerance: float) -> None:
    zeros = {name: float(metrics[name]) for name in _ZERO_AT_START if name in metrics}
    wrong = [
        f"{name} = {value:.6g} instead of 0"
        for name, value in zeros.items()
        # The mean over a label that the batch lacks is NaN, and its log-probability with it.
        if not abs(value) <= tolerance and not _has_none_of(name, metrics)
    ]
    loss = float(metrics["loss"])
    if expected is not None and not math.isclose(
        loss, expected, rel_tol=tolerance, abs_tol=tolerance * 1e-2
    ):
        wrong.insert(0, f"loss = {loss:.6g} instead of {expected:.6g}")
    if wrong:
        raise ValueError(
            f"The policy does not start at the reference model: {'; '.join(wrong)}. The reference "
            "log-probabilities were computed with another model, another data set or another "
            "tokenisation; delete the cached ones and start again."
        )


_ZERO_AT_START = ("rewards/chosen", "rewards/rejected", "kl")


def _has_none_of(name: str, metrics: Mapping[str, Any]) -> bool:
    return math.isnan(float(metrics.get(name.replace("rewards/", "logps/"), 0.0)))
