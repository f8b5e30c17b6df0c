"""Gradient accumulation that equals the large batch: one scan over microbatches.

The mean of the microbatches' losses is the loss of the batch only where a loss is a mean over rows
and the microbatches have equally many. A mean over tokens is not, and the KL term of KTO is a mean
over the whole batch inside of the loss. So a loss can say, as a `BatchLoss`, by what its values are
weighted, and what has to be known of the whole batch before any microbatch is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from train.models.trainable import join
from train.types import Batch, LossFn, Metrics, Params

Values = Mapping[str, jax.Array]
BATCH_MEANS = "batch_means"
"""The column of a batch that holds what `BatchLoss.batch_means` gives."""


@dataclass(frozen=True)
class BatchLoss:
    """A loss that says how its value on a batch follows from its values on microbatches.

    It is called like any loss function, so a step without accumulation and an evaluation use it as
    it is.

    Attributes:
      loss_fn: ``loss_fn(params, batch) -> (loss, metrics)``. The loss is a scalar, or scalars by name
        whose sum is the loss.
      weights: ``weights(batch)``: weight of a microbatch by name of a metric or of a term of the loss
        (a scalar one is ``"loss"``), such as its number of tokens or of desirable rows. A value on the
        batch is the mean of those on the microbatches with these weights. Where a name is missing,
        all microbatches weigh the same, as for a mean over rows.
      sums: metrics that add up over microbatches, such as ``num_tokens``.
      batch_means: ``batch_means(params, batch)``: means over rows, float32 by name. Those of the whole
        batch, without gradient, are in ``batch["batch_means"]`` when ``loss_fn`` is called (the KL of
        KTO).
      derived: Metrics that follow from others on the whole batch, such as a difference of two means
        with different weights.
    """

    loss_fn: Callable[[Any, Batch], tuple[Any, Values]]
    weights: Callable[[Batch], Values] | None = None
    sums: tuple[str, ...] = ()
    batch_means: Callable[[Any, Batch], Values] | None = None
    derived: Callable[[Values], Values] | None = None

    def __call__(self, params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """``(loss, metrics)`` on a whole batch."""
        if self.batch_means is not None:
            known = jax.lax.stop_gradient(self.batch_means(params, batch))
            batch = {**batch, BATCH_MEANS: known}
        loss, metrics = self.loss_fn(params, batch)
        return _total(_by_name(loss)), self.with_derived(metrics)

    def with_derived(self, metrics: Values) -> Metrics:
        """The metrics, and those that follow from them."""
        return {**metrics, **({} if self.derived is None else self.derived(metrics))}


def with_frozen(loss_fn: LossFn, frozen: Params) -> LossFn:
    """A loss of the trained parameters alone, from a loss of all: a plain one or a `BatchLoss`."""

    def joined(function: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
        return lambda params, batch: function(join(params, frozen), batch)

    loss = _as_batch_loss(loss_fn)
    means = None if loss.batch_means is None else joined(loss.batch_means)
    return replace(loss, loss_fn=joined(loss.loss_fn), batch_means=means)


def loss_and_gradient(
    loss_fn: LossFn, microbatches: int = 1
) -> Callable[[Any, Batch], tuple[tuple[jax.Array, Metrics], Any]]:
    """``f(params, batch) -> ((loss, metrics), gradient)`` of a mean over rows or a `BatchLoss`.

    ``f``, for use inside of ``jax.jit``, looks at the batch in ``microbatches``, so that
    activations take less memory. Row ``i`` is in microbatch ``i % microbatches``, so a batch that
    is spread over devices stays where it is. The results are those of the whole batch, up to
    rounding; the gradient is summed in float32 and has the parameters' dtypes. A metric whose
    weight is 0 on the whole batch is NaN. A batch that cannot be split evenly raises `ValueError`
    when ``f`` is traced.

    Example:
      >>> gradient = loss_and_gradient(lambda w, b: (w * b["x"].mean(), {}), microbatches=2)
      >>> float(gradient(jnp.float32(1.0), {"x": jnp.arange(4.0)})[1])
      1.5
    """
    if microbatches == 1:
        return jax.value_and_grad(loss_fn, has_aux=True)
    loss = _as_batch_loss(loss_fn)

    def accumulated(params: Any, batch: Batch) -> tuple[tuple[jax.Array, Metrics], Any]:
        split = _split(batch, microbatches)
        known = _means_of_batch(loss, params, split)
        # share_i = w_i / Σ_j w_j, so that Σ_i share_i · value_i is the value on the whole batch.
        weights = {} if loss.weights is None else jax.lax.map(loss.weights, split)
        shares = {name: weight / jnp.sum(weight) for name, weight in weights.items()}

        def weighted(params: Any, part: Batch, share: Values) -> tuple[jax.Array, Values]:
            def weigh(name: str, value: jax.Array) -> jax.Array:
                weight = share.get(name, jnp.float32(1 / microbatches))
                # A microbatch of no weight may hold a NaN, the mean of nothing. Where the whole batch
                # has no weight, the share is 0/0 and the NaN stays.
                return jnp.where(weight == 0, 0.0, value) * weight

            found, metrics = loss.loss_fn(params, {**part, **known})
            total = _total({name: weigh(name, term) for name, term in _by_name(found).items()})
            added = {n: v if n in loss.sums else weigh(n, v) for n, v in metrics.items()}
            return total, {**added, "loss": total}

        def add(gradient: Any, part: Any) -> tuple[Any, Values]:
            (_, metrics), more = jax.value_and_grad(weighted, has_aux=True)(params, *part)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), gradient, more), metrics

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), params
        )
        gradient, metrics = jax.lax.scan(add, zeros, (split, shares))
        metrics = {name: jnp.sum(value, axis=0) for name, value in metrics.items()}
        gradient = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradient, params)
        return (metrics["loss"], loss.with_derived(metrics)), gradient

    return accumulated


def columns_in_microbatches(
    columns: Callable[[Any, Batch], Batch], params: Any, batch: Batch, microbatches: int
) -> dict[str, jax.Array]:
    """``columns(params, batch)``, arrays with the rows on axis 0, computed in microbatches."""
    if microbatches == 1:
        return dict(columns(params, batch))
    found = jax.lax.map(lambda part: dict(columns(params, part)), _split(batch, microbatches))
    # `_split` dealt the rows out in turn: row i is row i // microbatches of part i % microbatches.
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), found)


def _as_batch_loss(loss_fn: LossFn) -> BatchLoss:
    return loss_fn if isinstance(loss_fn, BatchLoss) else BatchLoss(loss_fn)


def _split(batch: Batch, microbatches: int) -> dict[str, Any]:
    """The batch with a leading axis of microbatches."""
    rows = next(len(column) for column in jax.tree.leaves(batch) if jnp.ndim(column))
    if rows % microbatches:
        raise ValueError(f"a batch of {rows} rows cannot be split into {microbatches} equal parts.")

    def split(column: jax.Array) -> jax.Array:
        column = jnp.asarray(column)
        if not column.ndim:  # the same for every row, such as the number of the step
            return jnp.broadcast_to(column, microbatches)
        # Rows dealt out in turn: every device keeps its own where rows are spread over devices.
        shape = (rows // microbatches, microbatches, *column.shape[1:])
        return jnp.moveaxis(column.reshape(shape), 1, 0)

    return jax.tree.map(split, dict(batch))


def _means_of_batch(loss: BatchLoss, params: Any, split: Batch) -> dict[str, Any]:
    """The column of `BATCH_MEANS`; empty where the loss needs none."""
    compute = loss.batch_means
    if compute is None:
        return {}
    values = jax.lax.map(lambda part: compute(params, part), split)
    means = jax.tree.map(lambda value: jnp.mean(value, axis=0), values)
    return {BATCH_MEANS: jax.lax.stop_gradient(means)}


def _by_name(loss: Any) -> dict[str, Any]:
    return dict(loss) if isinstance(loss, Mapping) else {"loss": loss}


def _total(terms: Values) -> jax.Array:
    return sum(terms.values(), start=jnp.zeros([], jnp.float32))
