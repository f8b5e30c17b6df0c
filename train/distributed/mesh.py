"""The mesh of a run: its shape, its devices, and the compiler options that go with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from train.config import MeshOptions, require
from train.distributed.axes import MESH_AXES

_PRODUCT = "mesh.data * mesh.fsdp * mesh.tensor"


def make_mesh(options: MeshOptions) -> Mesh | None:
    """The mesh of a run, with the axes `MESH_AXES`; None for a single device, where none is needed.

    Raises `UserError` where there are fewer devices, or, on several processes or slices, not exactly as
    many; or where slices would share parameters.
    """
    devices = jax.devices()
    shape = mesh_shape(options, len(devices), count_slices(devices))
    count = math.prod(shape)
    if jax.process_count() > 1:  # one without devices in the mesh would have nothing to do
        expected = f"{len(devices)}, the devices of all {jax.process_count()} processes"
        require(count == len(devices), _PRODUCT, count, expected)
    return None if count == 1 else arrange(devices[:count], shape)


def count_slices(devices: Sequence[Any]) -> int:
    """The number of slices of TPUs, which only a network joins, that the devices belong to.

    What JAX calls a slice of GPUs is a host, unless it was told otherwise. Parameters are commonly
    split over the network between hosts, so GPUs count as one slice.
    """
    if not devices or devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def arrange(devices: Sequence[Any], shape: tuple[int, int, int]) -> Mesh:
    """The mesh of some devices, neighbours along an axis where the links between them are fast.

    On several slices of TPUs ``data`` goes over the slices first, so that the other axes stay within a
    slice. GPUs lie in the order of their hosts, the last axis within one.
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


def compiler_options(mesh: Mesh | AbstractMesh | None) -> dict[str, Any] | None:
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

    Raises `UserError` where they do not suffice, or ``data`` is no multiple of the number of slices.

    Example:
        >>> mesh_shape(MeshOptions(tensor=2), 8)
        (1, 4, 2)
        >>> mesh_shape(MeshOptions(tensor=2), 16, slices=2)
        (2, 4, 2)
    """
    data = slices if options.data is None else options.data
    expected = (
        f"a multiple of {slices} (slices of TPUs here, and only a network between them) or unset"
    )
    require(data % slices == 0, "mesh.data", data, expected)
    others = data * options.tensor
    fsdp = max(1, devices // others) if options.fsdp is None else options.fsdp
    count = others * fsdp
    require(count <= devices, _PRODUCT, count, f"at most {devices} (devices here)")
    if options.fsdp is None:
        expected = f"a divisor of the {devices} devices, or mesh.fsdp set"
        require(count == devices, "mesh.data * mesh.tensor", others, expected)
    if slices > 1:
        expected = f"{devices}, the devices of all {slices} slices"
        require(count == devices, _PRODUCT, count, expected)
    return data, fsdp, options.tensor


def on_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """A context in which activations find the mesh (`train.distributed.axes.constrain`)."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)
