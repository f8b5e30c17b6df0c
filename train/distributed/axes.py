"""Logical axes of parameters and activations, and the axes of a mesh that they are split over.

Parameters name what an axis is (``"embed"``, ``"heads"``), never where it lies; `RULES` alone says
that. Batches go over ``data`` and ``fsdp``, weights over ``fsdp`` and ``tensor`` (Rajbhandari et al.
2020; Shoeybi et al. 2019), and the residual stream between blocks over ``tensor`` along the sequence,
where every position is treated alike (Korthikanti et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
"""Axes of the mesh of a run, the slowest network first."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Mesh axes of every logical axis."""


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Where an array with logical axes (a name or None for each) lies on a mesh.

    The mesh has any of `MESH_AXES`. An axis whose mesh axes are missing, or whose size their devices do
    not divide, stays whole.

    Example:
        >>> mesh = AbstractMesh((2, 4), ("fsdp", "tensor"))
        >>> partition_spec(("embed", "mlp"), (64, 30), mesh)
        PartitionSpec('fsdp', None)
    """
    entries: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        split = tuple(name for name in RULES.get(axis or "", ()) if name in mesh.shape)
        if not split or size % math.prod(mesh.shape[name] for name in split):
            entries.append(None)
        else:
            entries.append(split[0] if len(split) == 1 else split)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Constrains the sharding of an activation on the mesh of `jax.set_mesh`, where there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
