"""The machines that a plan is made for: their number, peaks and, where they have one, compiler."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from train.config import MeshOptions, UserError
from train.distributed.axes import MESH_AXES
from train.distributed.mesh import arrange, mesh_shape


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    TPUs: cloud.google.com/tpu/docs/v5e, /v5p and /v6e (bfloat16 peak, HBM, interchip interconnect,
    of which half of the bidirectional figure counts here, and data-centre network: 50 Gbit/s for a
    chip of a v5p, 6.4 and 25.6 Tbit/s for the 256 of a pod of v5e and v6e). GPUs: NVIDIA's data sheets
    of the SXM modules (bfloat16 without sparsity; half of NVLink's figure), and the usual 400 Gbit/s of
    network for each.

    `interconnect` is what arrives from other chips over all links together, and `network` what arrives
    from where no link goes: other slices, or other hosts of GPUs.
    """

    flops: float  # bfloat16 operations a second
    hbm: float  # bytes of memory, of which the system keeps some
    hbm_bandwidth: float  # bytes a second, as the next two
    interconnect: float
    network: float
    node: int = 0  # GPUs of a host; 0 for TPUs, whose slices have any size


CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 6.4e12 / 256 / 8),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 50e9 / 8),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 25.6e12 / 256 / 8),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 400e9 / 8, node=8),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 400e9 / 8, node=8),
}
"""Chips by their name in `topology`."""

TPUS = ("v5e", "v5p", "v6e")


@dataclass(frozen=True)
class Target:
    """The machine of a plan; `hbm` and `peaks` are None where they are not known."""

    topology: str  # the name, as given
    chips: int  # in all slices
    hbm: float | None  # bytes of memory of a chip
    peaks: Chip | None
    devices: tuple[Any, ...]  # to compile for; empty where there is no compiler
    slices: int = 1  # slices of TPUs, which a network joins

    def mesh(self, options: MeshOptions) -> Mesh | AbstractMesh:
        """The mesh that a run there has; an abstract one where there are no devices.

        Raises `UserError` where there are fewer chips, or slices would share parameters.
        """
        shape = mesh_shape(options, self.chips, self.slices)
        if not self.devices:
            kinds = (AxisType.Auto,) * len(MESH_AXES)
            return AbstractMesh(shape, MESH_AXES, axis_types=kinds)
        return arrange(self.devices[: math.prod(shape)], shape)


def read_target(topology: str) -> Target:
    """Reads the name of a target.

    It is such as ``v5p:4x4x8``, ``2xv5e:4x4`` for two slices, ``cpu:8``, ``h100:8`` or ``gpu:8x80``.
    Raises `UserError` for any other name, or where its compiler is not installed.
    """
    name, _, size = topology.partition(":")
    found = re.fullmatch(rf"(?:([1-9]\d*)x)?({'|'.join(TPUS)})", name)
    if found and re.fullmatch(r"\d+(x\d+){1,2}", size):
        return _tpus(topology, found[2], size, int(found[1] or 1))
    if name == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        devices = tuple(jax.devices("cpu")[: int(size)])
        return Target(topology, int(size), None, None, devices)
    if name == "gpu" and (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)):
        return Target(topology, int(found[1]), 1e9 * int(found[2]), None, ())
    if name in CHIPS and name not in TPUS and re.fullmatch(r"[1-9]\d*", size):
        return Target(topology, int(size), CHIPS[name].hbm, CHIPS[name], ())
    raise UserError(
        f"topology is {topology!r}; give a slice of TPUs ({', '.join(TPUS)}) such as v5p:4x4x8, "
        "several such as 2xv5e:4x4, cpu:8, h100:8 or h200:8, or gpu:8x80 for 8 GPUs with 80 GB each."
    )


def _tpus(topology: str, name: str, size: str, slices: int) -> Target:
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(f"{name}:{size}", "tpu", **several).devices
    except Exception as error:  # the compiler's own types are not public
        raise UserError(
            f"topology {topology}: {error}. It needs the TPU compiler (pip install '.[tpu]'), and a "
            f"slice that exists, such as {'v5p:2x2x1' if name == 'v5p' else name + ':2x2'}."
        ) from error
    return Target(topology, len(found), CHIPS[name].hbm, CHIPS[name], tuple(found), slices)
