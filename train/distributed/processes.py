"""Communication between the processes of a run, apart from the arrays of the training step.

All processes must call these functions together, except `is_first`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def is_first() -> bool:
    """Whether this is the process that writes the files that all processes share."""
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """The first process's value, of types that JSON has, on every process."""
    if jax.process_count() == 1:
        return value
    mine = json.dumps(value).encode() if is_first() else b""
    text = np.frombuffer(mine.ljust(largest_of_all(len(mine)), b" "), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


def from_each(value: Any) -> list[Any]:
    """The values of all processes, of types that JSON has, in their order, on every process."""
    rows = bytes_of_all(np.frombuffer(json.dumps(value).encode(), np.uint8))
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]


def largest_of_all(value: int) -> int:
    """The largest of the numbers that the processes give, on every process."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.asarray(value))))


def bytes_of_all(array: np.ndarray) -> list[np.ndarray]:
    """The bytes of an array of each process, in their order, on every process: uint8 ``[bytes]``.

    All are padded to the longest one. As bytes, arrays of 64 bits keep them all.
    """
    data = array.tobytes()
    padded = np.frombuffer(data.ljust(largest_of_all(len(data)), b"\0"), np.uint8)
    return list(np.atleast_2d(multihost_utils.process_allgather(padded)))


def fetch(tree: Any) -> Any:
    """Arrays that are spread over all processes as whole NumPy arrays, on every process."""

    def one(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(one, tree) if jax.process_count() > 1 else jax.device_get(tree)


def barrier(name: str) -> None:
    """Returns when all processes have called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def true_anywhere(flag: bool) -> jax.Array:
    """Whether the flag is up on any process: a bool scalar, the same everywhere.

    Only reading it waits for the others.
    """
    mesh, combine = _any_over_devices()
    mine = np.full(jax.local_device_count(), flag)
    rows = NamedSharding(mesh, PartitionSpec("device"))
    return combine(jax.make_array_from_process_local_data(rows, mine))


@functools.cache
def _any_over_devices() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.asarray(jax.devices()), ("device",))
    return mesh, jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
