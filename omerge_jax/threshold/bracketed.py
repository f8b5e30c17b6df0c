"""The k-th largest magnitude of each tensor of a large leaf, in about three passes over it.

The leaf need not be stored: every pass may compute it anew, so that no temporary array is as large.
A pass counts the entries that reach each of a few candidates. A sample says where the first ones are
put; from then on the counts themselves tell to within a few standard deviations where the threshold
is. The same pass keeps, of every row, the entries between the ends of the interval, as long as they
are three or fewer: their maximum, minimum and sum say which they are. Once that holds for every row,
the rest is a search among these few. Only sums, maxima and minima of rows cross devices. Where
magnitudes tie, the search goes on over the order of the entries.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from omerge_jax.entries import Entries, entries_of
from omerge_jax.numerics import Reduction, reduce_together
from omerge_jax.threshold.edge import (
    TieOrder,
    as_edge,
    choose,
    countable,
    magnitude_bits,
    per_layer,
    search_keys,
)

_PARTS = 8
_ALL = 2**32 - 1
# Entries of a row that are kept, and the fewest entries of what is taken for a row.
_SLOTS, _ROW = 3, 128
# Where the threshold is not where it was thought to be, so many times as far is looked next.
_FURTHER = 64
# Standard deviations between where it should be and the outer candidates.
_SPREAD = 4.0


class Bracket(NamedTuple):
    """Where a threshold is thought to be, float32 [*layers]; if it is not there, the search goes on."""

    low: jax.Array  # a magnitude that ``k`` entries or more are thought to reach
    high: jax.Array  # a magnitude that fewer are thought to exceed


# Compiled by itself, or every call outside of jax.jit would compile its loop anew.
@functools.partial(jax.jit, static_argnames="layer_axes")
def large_top_k_edge(
    x: jax.Array, k: jax.typing.ArrayLike, order: TieOrder, layer_axes: int, bracket: Bracket
) -> jax.Array:
    """Returns what `omerge_jax.threshold.edge.top_k_edge` does, for a large ``x``."""
    return find_edge(entries_of(x), k, order, layer_axes, bracket)[0]


def find_edge(
    entries: Entries, k: jax.typing.ArrayLike, order: TieOrder, layer_axes: int, bracket: Bracket
) -> tuple[jax.Array, jax.Array]:
    """Returns the edge of `large_top_k_edge`, and how many passes were taken, an int32 scalar."""
    # The bits that a narrower dtype has not got are left out, so that neighbours differ by one.
    unused = max(0, 23 - jnp.finfo(entries.dtype).nmant)
    last_key = (_ALL >> 1) >> unused
    rows = _Rows(entries.shape, layer_axes)
    countable(entries.shape, layer_axes)

    def bits(turn: jax.Array) -> jax.Array:
        return magnitude_bits(entries.read_again(turn)) >> unused

    def unfinished(carry: tuple[jax.Array, _Interval, jax.Array]) -> jax.Array:
        return jnp.any(_is_open(carry[1], wanted))

    def narrow(carry: tuple[jax.Array, _Interval, jax.Array]) -> Any:
        turn, interval, _ = carry
        begins = _candidates(interval, wanted)
        seen = _look(bits(turn), order, turn < 0, interval, begins, rows)
        narrower = _narrower(interval, begins, seen, wanted, last_key)
        # A tensor whose search is over waits for the others.
        return turn + 1, choose(_is_open(interval, wanted), narrower, interval), seen.slots

    low, high = (magnitude_bits(edge) >> unused for edge in bracket)
    wanted = jnp.maximum(jnp.asarray(k), 1).astype(jnp.uint32) + jnp.zeros_like(low)
    # Zeros of the sharding that the slots have.
    nothing = jnp.sum(bits(jnp.int32(0)) & 0, rows.axes, dtype=jnp.uint32)
    start = (jnp.int32(0), _start(low, high), jnp.stack([nothing] * _SLOTS, -1))
    turns, interval, slots = jax.lax.while_loop(unfinished, narrow, start)
    magnitude, limit = _settle(interval, slots, wanted, order, rows)
    return as_edge(magnitude << unused, limit, jnp.asarray(k)), turns


class _Rows:
    """What is taken for the rows of a leaf: its last axes together, of ``width`` entries."""

    def __init__(self, shape: tuple[int, ...], layer_axes: int):
        first = len(shape)
        while first > layer_axes and math.prod(shape[first:]) < _ROW:
            first -= 1
        self.shape, self.layer_axes = shape, layer_axes
        self.axes = tuple(range(first, len(shape)))
        self.width = math.prod(shape[first:])
        # Bits that the place in a row needs.
        self.index_bits = (self.width - 1).bit_length()

    def columns(self, never: jax.Array) -> jax.Array:
        """Returns the place of every entry in its row, uint32 of the leaf's shape, see `TieOrder`."""
        return self._index(self.shape, self.axes, never)

    def indices(self, columns: jax.Array) -> jax.Array:
        """Returns the row-major index in the tensor of entries [*layers, *rows, slots]."""
        rows = self.shape[: self.axes[0]]
        inner = tuple(range(self.layer_axes, len(rows)))
        row = self._index((*rows, 1), inner, False)
        return row * jnp.uint32(self.width) + columns

    def _index(
        self, shape: tuple[int, ...], axes: tuple[int, ...], never: jax.typing.ArrayLike
    ) -> jax.Array:
        index = jnp.broadcast_to(jnp.asarray(never, jnp.uint32), shape)
        for axis in axes:
            place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            index = index * jnp.uint32(shape[axis]) + place
        return index


class _Interval(NamedTuple):
    """Keys between which the threshold is sought: magnitudes, or the order among those that tie.

    All fields are [*layers], uint32 or bool.
    """

    low: jax.Array
    last: jax.Array  # inclusive
    # How many entries reach ``low``, how many lie beyond ``last``, and whether both were counted.
    reaching: jax.Array
    above: jax.Array
    known: jax.Array
    evenly: jax.Array  # whether the next candidates are spread over all of the interval
    ordering: jax.Array  # whether keys are the order of the entries of magnitude ``settled``
    settled: jax.Array
    collected: jax.Array  # whether the slots hold all entries of the interval


def _start(low: jax.Array, high: jax.Array) -> _Interval:
    nothing, no = jnp.zeros_like(low), jnp.zeros_like(low, dtype=bool)
    last = jnp.maximum(low, high)
    return _Interval(low, last, nothing, nothing, no, no, no, nothing, no)


def _is_open(interval: _Interval, wanted: jax.Array) -> jax.Array:
    """Returns which tensors are still searched."""
    exact = interval.known & (interval.reaching == wanted)
    return ~(interval.collected | exact)


def _candidates(interval: _Interval, wanted: jax.Array) -> list[jax.Array]:
    """Returns the beginnings of the parts of an interval, the first of them its own.

    Where the counts are known the threshold lies about where entries spread evenly would put it: the
    inner parts are narrow and lie there, and only the outer ones are wide.
    """
    low, last, reaching, above, known, evenly, *_ = interval
    inside = jnp.maximum(reaching - above, 1).astype(jnp.float32)
    place = (reaching - wanted).astype(jnp.float32) / inside
    spread = _SPREAD * jnp.sqrt(place * (1 - place) / inside) + 2 / inside
    # Three standard deviations of what a sample says.
    near, far = (
        jnp.where(known, place + side, 0.5 + at) for side, at in ((-spread, -0.25), (spread, 0.25))
    )
    near = jnp.where(evenly, 1 / _PARTS, jnp.maximum(near, 0.0))
    far = jnp.where(evenly, 1 - 1 / _PARTS, jnp.minimum(far, 1.0))
    length = (last - low).astype(jnp.float32) + 1
    begins = [low]
    for n in range(_PARTS - 1):
        offset = length * (near + (far - near) * (n / (_PARTS - 2)))
        # The largest float32 below 2**32: beyond it the conversion is undefined.
        offset = jnp.minimum(offset, 4294967040.0).astype(jnp.uint32)
        begins.append(low + jnp.minimum(offset, last - low))
    return begins


class _Seen(NamedTuple):
    """What a pass over a leaf sees."""

    counts: list[jax.Array]  # uint32 [*layers] each, how many entries reach each candidate
    beyond: jax.Array  # uint32 [*layers], how many lie beyond the interval
    # uint32 [*layers, *rows, slots], entries inside as 1 + key − low and the place in the row, or 0.
    slots: jax.Array
    all_kept: jax.Array  # bool [*layers], whether the slots hold all of them


def _look(
    bits: jax.Array,
    order: TieOrder,
    never: jax.Array,
    interval: _Interval,
    begins: list[jax.Array],
    rows: _Rows,
) -> _Seen:
    """Takes a pass over the magnitudes' bits, uint32 [*layers, ...]."""
    low, last, ordering = (
        per_layer(v, bits) for v in (interval.low, interval.last, interval.ordering)
    )
    settled = per_layer(interval.settled, bits)
    tied = bits == settled
    # What is computed from places alone is given the sharding of the leaf.
    zero = bits & 0
    rank = jnp.where(tied, order(never) + zero, jnp.where(bits > settled, jnp.uint32(_ALL), zero))
    keys = jnp.where(ordering, rank, bits)
    inside = (keys >= low) & (keys <= last) & (tied | ~ordering)
    index_bits = _index_bits(interval, rows)
    index = jnp.where(ordering, zero, rows.columns(never) + zero)
    slot = ((keys - low + 1) << per_layer(index_bits, bits)) | index
    kept = jnp.where(inside, slot, jnp.uint32(0))
    marks = [(keys >= per_layer(begin, bits)).astype(jnp.uint32) for begin in begins]
    marks += [(keys > last).astype(jnp.uint32), inside.astype(jnp.uint32), kept]
    sums: list[tuple[jax.Array, Reduction]] = [(mark, "sum") for mark in marks]
    least_of = jnp.where(inside, slot, jnp.uint32(_ALL))
    ends: list[tuple[jax.Array, Reduction]] = [(kept, "max"), (least_of, "min")]
    *counts, beyond, number, total, most, least = reduce_together([*sums, *ends], rows.axes)
    slots = [
        jnp.where(number >= 1, most, 0),
        jnp.where(number >= 2, least, 0),
        jnp.where(number >= 3, total - most - least, 0),
    ]
    axes = tuple(range(rows.layer_axes, number.ndim))
    fits = interval.last - interval.low < (jnp.uint32(_ALL) >> index_bits)
    return _Seen(
        [jnp.sum(count, axes, dtype=jnp.uint32) for count in counts],
        jnp.sum(beyond, axes, dtype=jnp.uint32),
        jnp.stack(slots, -1),
        fits & jnp.all(number <= _SLOTS, axes),
    )


def _index_bits(interval: _Interval, rows: _Rows) -> jax.Array:
    """Returns how many bits of a slot say where in its row it is: none where the order says it."""
    return jnp.where(interval.ordering, jnp.uint32(0), jnp.uint32(rows.index_bits))


def _narrower(
    interval: _Interval, begins: list[jax.Array], seen: _Seen, wanted: jax.Array, last_key: int
) -> _Interval:
    """Returns the part of an interval that the threshold is in, or where it is outside, that side."""
    low, last = interval.low, interval.last
    # What has been counted before: among ties others than those of the interval count as well.
    reaching = jnp.where(interval.known, interval.reaching, seen.counts[0])
    above = jnp.where(interval.known, interval.above, seen.beyond)
    counted = interval._replace(reaching=reaching, above=above, known=jnp.ones_like(interval.known))
    counts = [jnp.where(b == low, reaching, n) for b, n in zip(begins, seen.counts, strict=True)]
    counts.append(above)
    ends = [*(begin - 1 for begin in begins[1:]), last]
    found = counted
    for n, begin in enumerate(begins):
        outer = interval.known & ~interval.evenly & (n in (0, _PARTS - 1))
        part = counted._replace(
            low=begin, last=ends[n], reaching=counts[n], above=counts[n + 1], evenly=outer
        )
        found = choose(counts[n] >= wanted, part, found)
    single = (found.low == found.last) & (found.reaching != wanted) & ~found.ordering
    among_ties = found._replace(
        low=jnp.zeros_like(low),
        last=jnp.full_like(last, jnp.uint32(_ALL)),
        evenly=jnp.zeros_like(single),
        ordering=jnp.ones_like(single),
        settled=found.low,
    )
    found = choose(single, among_ties, found)
    found = choose(seen.all_kept, counted._replace(collected=jnp.ones_like(single)), found)
    step = jnp.minimum(last - low + 1, jnp.uint32(_ALL // _FURTHER)) * _FURTHER
    higher = interval._replace(
        low=jnp.minimum(last, jnp.uint32(last_key - 1)) + 1,
        last=last + jnp.minimum(step, jnp.maximum(last, jnp.uint32(last_key)) - last),
    )
    lower = interval._replace(low=low - jnp.minimum(step, low), last=jnp.maximum(low, 1) - 1)
    return choose(above >= wanted, higher, choose(reaching < wanted, lower, found))


def _settle(
    interval: _Interval, slots: jax.Array, wanted: jax.Array, order: TieOrder, rows: _Rows
) -> tuple[jax.Array, jax.Array]:
    """Returns the threshold's key and the limit among ties, from the slots where they hold it."""
    index_bits = per_layer(_index_bits(interval, rows), slots)
    keys = slots >> index_bits
    columns = slots & ((jnp.uint32(1) << index_bits) - 1)
    among = order.at(rows.indices(columns))
    left = jnp.where(interval.collected, wanted - interval.above, 1)
    found, limit, _ = search_keys(
        lambda never: jnp.where(never, 0, keys), lambda never: among, left, slots.shape
    )
    key = jnp.where(interval.collected, interval.low + jnp.maximum(found, 1) - 1, interval.low)
    limit = jnp.where(interval.collected, limit, 0)
    ordering = interval.ordering
    return jnp.where(ordering, interval.settled, key), jnp.where(ordering, key, limit)
