"""How the rows of a batch are split over the mesh, and which of them each process loads.

The rows are cut into equal parts, one for every group of devices along ``data`` and ``fsdp``. A part
belongs to several processes where a ``tensor`` axis spans them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from train.config import require
from train.distributed.axes import RULES
from train.distributed.processes import bytes_of_all


def check_batch(
    name: str, batch_size: int, mesh: Mesh | AbstractMesh | None, microbatches: int = 1
) -> None:
    """Checks that each of the microbatches of a batch can be split over the mesh.

    Raises `UserError`, which names the field `name`, where `batch_size` is no multiple of both numbers.
    """
    devices = row_devices(mesh)
    reasons = [f"{devices} devices of the mesh"] if microbatches == 1 or devices > 1 else []
    if microbatches > 1:
        reasons.append(f"{microbatches} trainer.gradient_accumulation_steps")
    count = devices * microbatches
    expected = f"a multiple of {count} ({' times '.join(reasons)})"
    require(batch_size % count == 0, name, batch_size, expected)


def row_devices(mesh: Mesh | AbstractMesh | None) -> int:
    """The number of parts into which the mesh splits the rows of a batch."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _row_axes(mesh))


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of a batch: its rows are split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(_row_axes(mesh)))


def _row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(axis for axis in RULES["batch"] if axis in mesh.shape)


def row_parts(mesh: Mesh | None) -> tuple[tuple[int, ...], int]:
    """The parts of a batch that this process loads, and the number of all parts.

    Processes whose devices share a part, because a tensor axis spans them, all load it. Without a mesh
    there is one part, ``((0,), 1)``.
    """
    return _parts_by_process(mesh)[jax.process_index()], row_devices(mesh)


@functools.cache
def _parts_by_process(mesh: Mesh | None) -> list[tuple[int, ...]]:
    """The parts that each process loads, in order."""
    if mesh is None:
        return [(0,)] * jax.process_count()
    count = row_devices(mesh)
    places = batch_sharding(mesh).devices_indices_map((count,))
    held = {(device.process_index, index[0].indices(count)[0]) for device, index in places.items()}
    return [
        tuple(sorted(part for process, part in held if process == number))
        for number in range(jax.process_count())
    ]


def own_rows(values: np.ndarray, mesh: Mesh | None) -> np.ndarray:
    """This process's rows, as `put_batch` takes them, of a batch that it has whole."""
    parts, count = row_parts(mesh)
    if len(parts) == count:
        return values
    size = len(values) // count
    return np.concatenate([values[part * size : (part + 1) * size] for part in parts])


def agree_on_shared_rows(values: np.ndarray, mesh: Mesh | None) -> np.ndarray:
    """This process's rows, with the values of the first of the processes that share them.

    Where a tensor axis spans processes they all compute what belongs to a row on the host, and what
    depends on more than the row may differ. `values` are ``[rows, …]``, those of this process's
    `row_parts` in order. All processes must call this.
    """
    held = _parts_by_process(mesh)
    if sum(map(len, held)) == row_devices(mesh):  # none is shared
        return values
    mine = held[jax.process_index()]
    size = len(values) // len(mine)
    sent = bytes_of_all(values)

    def of_first(part: int) -> np.ndarray:
        process = next(number for number, parts in enumerate(held) if part in parts)
        count = len(held[process]) * size * values[0].size
        theirs = sent[process].tobytes()[: count * values.itemsize]
        rows = np.frombuffer(theirs, values.dtype).reshape(-1, *values.shape[1:])
        first = held[process].index(part) * size
        return rows[first : first + size]

    return np.concatenate([of_first(part) for part in mine])


def row_numbers(count: int, mesh: Mesh | None) -> np.ndarray:
    """Where the `count` rows of this process are in the whole batch, int32 ``[count]``."""
    parts, _ = row_parts(mesh)
    size = count // len(parts)
    return np.concatenate([part * size + np.arange(size, dtype=np.int32) for part in parts])


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Moves onto the mesh a batch of which each process has the rows of its `row_parts`, in order."""
    return _put(batch, mesh, row_parts(mesh)[0])


def put_whole(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Moves onto the mesh a batch that every process has whole."""
    return _put(batch, mesh, range(row_devices(mesh)))


def _put(
    batch: Mapping[str, np.ndarray], mesh: Mesh | None, parts: Sequence[int]
) -> dict[str, Any]:
    if mesh is None:
        return {name: jax.device_put(value) for name, value in batch.items()}
    place, count = batch_sharding(mesh), row_devices(mesh)

    def put(value: np.ndarray) -> jax.Array:
        value = np.asarray(value)
        size = len(value) // len(parts)
        shape = (size * count, *value.shape[1:])

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first = parts.index(index[0].indices(shape[0])[0] // size) * size
            return value[first : first + size]

        return jax.make_array_from_callback(shape, place, part)

    return {name: put(value) for name, value in batch.items()}
