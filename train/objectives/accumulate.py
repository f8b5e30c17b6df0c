"""Gradient accumulation that equals the large batch: one scan over parts of a batch.

The mean of the parts' losses is the loss of the batch only where a loss is a mean over rows and the
parts have equally many. A mean over tokens is not, and the KL term of KTO is a mean over the whole
batch inside of the loss. So a loss can say, as a `Parted`, by what its values are weighted, and what
has to be known of the whole batch before any part is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Batch = Mapping[str, Any]
Values = Mapping[str, jax.Array]
NORMALIZERS = "normalizers"


@dataclass(frozen=True)
class Parted:
    """A loss that says how its value on a batch follows from its values on parts of the batch.

    It is called like any loss function, so that a step without accumulation and an evaluation use it
    as it is.

    Attributes:
      loss_fn: ``loss_fn(params, batch) -> (loss, metrics)``; a plain one is a mean over rows. The loss
        is a scalar, or scalars by name whose sum is the loss.
      masses: ``masses(batch)``: weight of a part by name of a metric or of a term of the loss (a
        scalar one is ``"loss"``), such as the number of tokens or of desirable rows; a value on the
        batch is the mean of those on the parts with these weights. A name that is missing weighs by
        rows.
      sums: metrics that add up over parts, such as ``num_tokens``.
      normalizers: ``normalizers(params, batch)``: means over the rows of a part, float32 by name. Their
        mean over the whole batch, without gradient, is in ``batch["normalizers"]`` when ``loss_fn`` is
        called (the KL of KTO).
      derived: Metrics that follow from others on the whole batch, such as a difference of two means
        with different weights.
    """

    loss_fn: Callable[[Any, Batch], tuple[Any, Values]]
    masses: Callable[[Batch], Values] | None = None
    sums: tuple[str, ...] = ()
    normalizers: Callable[[Any, Batch], Values] | None = None
    derived: Callable[[Values], Values] | None = None

    def __call__(self, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """``(loss, metrics)`` on a whole batch."""
        if self.normalizers is not None:
            known = jax.lax.stop_gradient(self.normalizers(params, batch))
            batch = {**batch, NORMALIZERS: known}
        loss, metrics = self.loss_fn(params, batch)
        return _total(_named(loss)), self.finish(dict(metrics))

    def finish(self, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Adds the derived metrics."""
        return metrics if self.derived is None else metrics | dict(self.derived(metrics))

    def mass(self, batch: Batch) -> Callable[[str], jax.Array]:
        """The weight of a part by name, float32 scalars."""
        known = {} if self.masses is None else self.masses(batch)
        rows = jnp.float32(_rows(batch))
        return lambda name: jnp.asarray(known.get(name, rows), jnp.float32)


def loss_and_gradient(
    loss_fn: Any, parts: int = 1
) -> Callable[[Any, Batch], tuple[tuple[jax.Array, dict[str, jax.Array]], Any]]:
    """``f(params, batch) -> ((loss, metrics), gradient)``, a batch being looked at in parts.

    Args:
      loss_fn: ``loss_fn(params, batch) -> (loss, metrics)``, a mean over rows, or a `Parted`.
      parts: how many. Memory for activations shrinks accordingly. Row ``i`` is in part ``i % parts``,
        so that a batch that is spread over devices stays where it is.

    Returns:
      A function for use inside of ``jax.jit``. What it returns is that of the whole batch, up to
      rounding; the gradient is summed in float32 and has the parameters' dtypes. A metric whose
      weight is 0 on the whole batch is NaN.

    Raises:
      ValueError: when traced with a batch that cannot be split evenly.

    Example:
      >>> gradient = loss_and_gradient(lambda w, b: (w * b["x"].mean(), {}), parts=2)
      >>> float(gradient(jnp.float32(1.0), {"x": jnp.arange(4.0)})[1])
      1.5
    """
    if parts == 1:
        return jax.value_and_grad(loss_fn, has_aux=True)
    parted = loss_fn if isinstance(loss_fn, Parted) else Parted(loss_fn)

    def whole(params: Any, batch: Batch) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
        split = _split(batch, parts)
        known = _mean_normalizers(parted, params, split, parts)
        shape = jax.eval_shape(parted.loss_fn, params, {**_first(split), **known})
        names = [*_named(shape[0]), *(n for n in shape[1] if n not in parted.sums)]
        masses = jax.lax.map(lambda part: _masses(parted, part, names), split)
        whole_mass = {name: jnp.sum(mass) for name, mass in masses.items()}

        def of_part(params: Any, part: Batch, mass: Values) -> tuple[jax.Array, Values]:
            loss, metrics = parted.loss_fn(params, {**part, **known})
            share = {name: mass[name] / whole_mass[name] for name in mass}
            terms = {name: _weighed(term, share[name]) for name, term in _named(loss).items()}
            added = {
                name: value if name in parted.sums else _weighed(value, share[name])
                for name, value in metrics.items()
            }
            return _total(terms), {**added, "loss": _total(terms)}

        def add(total: Any, part: Any) -> tuple[Any, None]:
            (_, metrics), gradient = jax.value_and_grad(of_part, has_aux=True)(params, *part)
            return jax.tree.map(
                lambda a, b: a + b.astype(a.dtype), total, (metrics, gradient)
            ), None

        zeros = {name: jnp.zeros([], jnp.float32) for name in {**shape[1], "loss": None}}
        wide = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, _wide(leaf.dtype)), params)
        (metrics, gradient), _ = jax.lax.scan(add, (zeros, wide), (split, masses))
        gradient = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradient, params)
        return (metrics["loss"], parted.finish(metrics)), gradient

    return whole


def columns_in_parts(
    columns: Callable[[Any, Batch], Batch], params: Any, batch: Batch, parts: int
) -> dict[str, jax.Array]:
    """``columns(params, batch)``, arrays with the rows on axis 0, computed in parts."""
    if parts == 1:
        return dict(columns(params, batch))
    found = jax.lax.map(lambda part: dict(columns(params, part)), _split(batch, parts))

    def together(column: jax.Array) -> jax.Array:
        column = jnp.moveaxis(column, 0, 1)
        return column.reshape(-1, *column.shape[2:])

    return jax.tree.map(together, found)


def _split(batch: Batch, parts: int) -> dict[str, Any]:
    rows = _rows(batch)
    if rows % parts:
        raise ValueError(f"a batch of {rows} rows cannot be split into {parts} equal parts.")

    def split(column: jax.Array) -> jax.Array:
        column = jnp.asarray(column)
        if not column.ndim:  # the same for every row, such as the number of the step
            return jnp.broadcast_to(column, parts)
        # Rows dealt out in turn: every device keeps its own where rows are spread over devices.
        return jnp.moveaxis(column.reshape(rows // parts, parts, *column.shape[1:]), 1, 0)

    return jax.tree.map(split, dict(batch))


def _rows(batch: Batch) -> int:
    return next(len(column) for column in jax.tree.leaves(batch) if jnp.ndim(column))


def _first(split: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda column: column[0], split)


def _mean_normalizers(parted: Parted, params: Any, split: Any, parts: int) -> dict[str, Any]:
    compute = parted.normalizers
    if compute is None:
        return {}
    values = jax.lax.map(lambda part: compute(params, part), split)
    means = jax.tree.map(lambda value: jnp.sum(value, axis=0) / parts, values)
    return {NORMALIZERS: jax.lax.stop_gradient(means)}


def _masses(parted: Parted, part: Batch, names: list[str]) -> dict[str, jax.Array]:
    mass = parted.mass(part)
    return {name: mass(name) for name in names}


def _weighed(value: jax.Array, share: jax.Array) -> jax.Array:
    # A part of no weight may hold a NaN, the mean of nothing; 0/0 is left where no part has any.
    return jnp.where(share == 0, 0.0, value) * share


def _named(loss: Any) -> dict[str, Any]:
    return dict(loss) if isinstance(loss, Mapping) else {"loss": loss}


def _total(terms: Mapping[str, jax.Array]) -> jax.Array:
    return sum(terms.values(), start=jnp.zeros([], jnp.float32))


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
