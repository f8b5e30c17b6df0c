"""The device mesh of a run, and where parameters and batches lie on it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from train.config import MeshOptions, require
from train.distributed.axes import MESH_AXES, RULES
from train.distributed.processes import from_all
from train.models import Decoder, ModelConfig, param_shardings, split_model
from train.types import Params

_PRODUCT = "mesh.data * mesh.fsdp * mesh.tensor"


def make_mesh(options: MeshOptions) -> Mesh | None:
    """The mesh of a run, with the axes of `train.distributed.axes.MESH_AXES`.

    Args:
        options: Devices along each axis.

    Returns:
        The mesh, or None for a single device, where none is needed.

    Raises:
        UserError: there are fewer devices, or, on several processes or slices, not exactly as many;
            or slices would share parameters.
    """
    devices = jax.devices()
    shape = mesh_shape(options, len(devices), count_slices(devices))
    count = math.prod(shape)
    if jax.process_count() > 1:  # one without devices in the mesh would have nothing to do
        expected = f"{len(devices)}, the devices of all {jax.process_count()} processes"
        require(count == len(devices), _PRODUCT, count, expected)
    return None if count == 1 else arrange(devices[:count], shape)


def count_slices(devices: Sequence[Any]) -> int:
    """Over how many slices of TPUs, which only a network joins, devices are spread.

    What JAX calls a slice of GPUs is a host, unless it was told otherwise. Parameters are commonly
    split over the network between hosts, so nothing is asked of a mesh there.
    """
    if not devices or devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def arrange(devices: Sequence[Any], shape: tuple[int, int, int]) -> Mesh:
    """The mesh of some devices, neighbours along an axis where the links between them are fast.

    On several slices of TPUs ``data`` goes over the slices first, and what differs along the other
    axes alone shares a slice. GPUs lie in the order of their hosts, the last axis within one.

    Args:
        devices: As many as the shape has; of several slices all.
        shape: Devices along ``data``, ``fsdp`` and ``tensor``; ``data`` a multiple of the slices.
    """
    slices = count_slices(devices)
    if slices > 1:
        inside = (shape[0] // slices, *shape[1:])
        placed = create_hybrid_device_mesh(
            inside, (slices, 1, 1), list(devices), allow_split_physical_axes=True
        )
    else:
        placed = create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def compiler_options(mesh: Mesh | AbstractMesh | None) -> dict[str, bool] | None:
    """Options of the compiler for a step on a mesh.

    Without them the TPU compiler makes a gather over the three axes of a torus an all-reduce, which
    sends twice as much and keeps what it has gathered between forward and backward pass. A v6e has two
    axes and gathers anyway; there they only cost memory, and the compiler warns of them.
    """
    if not isinstance(mesh, Mesh):
        return None
    chip = mesh.devices.flat[0]
    if chip.platform != "tpu" or "v6" in chip.device_kind:
        return None
    return {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_prefer_async_allgather_to_allreduce": True,
    }


def mesh_shape(options: MeshOptions, devices: int, slices: int = 1) -> tuple[int, int, int]:
    """Devices along ``data``, ``fsdp`` and ``tensor``.

    Args:
        options: As set.
        devices: How many there are.
        slices: Over which they are spread, from `count_slices`.

    Raises:
        UserError: they do not suffice, or on several slices ``data`` is no multiple of their number.

    Example:
        >>> mesh_shape(MeshOptions(tensor=2), 8)
        (1, 4, 2)
        >>> mesh_shape(MeshOptions(tensor=2), 16, slices=2)
        (2, 4, 2)
    """
    data = slices if options.data is None else options.data
    found = (
        f"a multiple of {slices} (slices of TPUs here, and only a network between them) or unset"
    )
    require(data % slices == 0, "mesh.data", data, found)
    others = data * options.tensor
    fsdp = max(1, devices // others) if options.fsdp is None else options.fsdp
    count = others * fsdp
    expected = f"at most {devices} (devices here)"
    require(count <= devices, _PRODUCT, count, expected)
    if options.fsdp is None:
        named = f"a divisor of the {devices} devices, or mesh.fsdp set"
        require(count == devices, "mesh.data * mesh.tensor", others, named)
    if slices > 1:
        every = f"{devices}, the devices of all {slices} slices"
        require(count == devices, _PRODUCT, count, every)
    return data, fsdp, options.tensor


def on_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Within it, activations find the mesh (`train.distributed.axes.constrain`)."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def check_batch(
    name: str, batch_size: int, mesh: Mesh | AbstractMesh | None, parts: int = 1
) -> None:
    """Raises `UserError` when a batch, or each of its equal parts, cannot be split over the mesh."""
    devices = row_devices(mesh)
    reasons = [f"{devices} devices of the mesh"] if parts == 1 or devices > 1 else []
    if parts > 1:
        reasons.append(f"{parts} trainer.gradient_accumulation_steps")
    count = devices * parts
    expected = f"a multiple of {count} ({' times '.join(reasons)})"
    require(batch_size % count == 0, name, batch_size, expected)


def row_devices(mesh: Mesh | AbstractMesh | None) -> int:
    """Devices over which the rows of a batch are split."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _row_axes(mesh))


def rows(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Where a batch lies: its rows split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(_row_axes(mesh)))


def _row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(axis for axis in RULES["batch"] if axis in mesh.shape)


@functools.cache
def row_parts(mesh: Mesh | None) -> tuple[tuple[int, ...], int]:
    """The parts of a batch that this process loads, and into how many equal parts it is cut.

    Processes whose devices share a part, because a tensor axis spans them, all load it.

    Args:
        mesh: From `make_mesh`.

    Example:
        >>> row_parts(None)
        ((0,), 1)
    """
    count = row_devices(mesh)
    if mesh is None:
        return (0,), count
    places = rows(mesh).addressable_devices_indices_map((count,)).values()
    return tuple(sorted({index[0].indices(count)[0] for index in places if index})), count


def own_rows(values: np.ndarray, mesh: Mesh | None) -> np.ndarray:
    """This process's rows of a batch that it has whole; the inverse of what `put_batch` does."""
    parts, count = row_parts(mesh)
    if len(parts) == count:
        return values
    size = len(values) // count
    return np.concatenate([values[part * size : (part + 1) * size] for part in parts])


def same_for_all(values: np.ndarray, mesh: Mesh | None) -> np.ndarray:
    """This process's rows, as the first of the processes that share them has them.

    Where a tensor axis spans processes they all compute what belongs to a row on the host, and what
    depends on more than the row may differ. All processes must call this.

    Args:
        values: ``[rows, …]``, those of this process's `row_parts`, in order.
        mesh: From `make_mesh`.
    """
    parts = _parts_of_all(mesh)
    if sum(map(len, parts)) == row_devices(mesh):  # none is shared
        return values
    mine = parts[jax.process_index()]
    size = len(values) // len(mine)
    everywhere = from_all(values)

    def of_first(part: int) -> np.ndarray:
        process = next(number for number, held in enumerate(parts) if part in held)
        count = len(parts[process]) * size * values[0].size
        theirs = everywhere[process].tobytes()[: count * values.itemsize]
        rows = np.frombuffer(theirs, values.dtype).reshape(-1, *values.shape[1:])
        first = parts[process].index(part) * size
        return rows[first : first + size]

    return np.concatenate([of_first(part) for part in mine])


@functools.cache
def _parts_of_all(mesh: Mesh | None) -> list[list[int]]:
    """The `row_parts` of every process."""
    if mesh is None:
        return [[0]]
    count = row_devices(mesh)
    places = rows(mesh).devices_indices_map((count,))
    held = {(device.process_index, index[0].indices(count)[0]) for device, index in places.items()}
    return [
        sorted(part for process, part in held if process == number)
        for number in range(jax.process_count())
    ]


def row_numbers(count: int, mesh: Mesh | None) -> np.ndarray:
    """Where the `count` rows of this process are in the whole batch, int32 ``[count]``."""
    parts, _ = row_parts(mesh)
    size = count // len(parts)
    return np.concatenate([part * size + np.arange(size, dtype=np.int32) for part in parts])


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Moves a batch onto the devices, its rows split over the mesh.

    Args:
        batch: Arrays with the rows on axis 0; on several processes the rows of this one, which are
            those of its `row_parts`, in order.
        mesh: From `make_mesh`.
    """
    parts, count = row_parts(mesh)
    return _put(batch, mesh, parts, count)


def put_whole(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Like `put_batch`, for a batch that every process has whole."""
    count = row_devices(mesh)
    return _put(batch, mesh, range(count), count)


def _put(
    batch: Mapping[str, np.ndarray], mesh: Mesh | None, parts: Sequence[int], count: int
) -> dict[str, Any]:
    if mesh is None:
        return {name: jax.device_put(value) for name, value in batch.items()}
    place = rows(mesh)

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


def abstract_model(
    config: ModelConfig, mesh: Mesh | AbstractMesh | None
) -> tuple[nnx.GraphDef, Params]:
    """The structure of a model and the shapes and places of its parameters, without weights.

    Args:
        config: With the dtypes of the run.
        mesh: From `make_mesh`.

    Returns:
        The graph definition and a tree of `jax.ShapeDtypeStruct` as `train.models.split_model`
        makes them.
    """
    graphdef, params = split_model(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), params)
    else:
        places = param_shardings(config, mesh)
    return graphdef, jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        params,
        places,
    )
