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

    Attributes:
        flops: bfloat16 operations a second.
        hbm: Bytes of memory, of which the system keeps some.
        hbm_bandwidth: Bytes a second.
        interconnect: Bytes a second that arrive from other chips, over all links together.
        network: Bytes a second that arrive for each chip from where no link goes: other slices, or
            other hosts of GPUs.
        node: GPUs of a host; 0 for TPUs, whose slices have any size.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    interconnect: float
    network: float
    node: int = 0


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
    """What a plan is made for.

    Attributes:
        topology: The name, as given.
        chips: Number of chips in all slices.
        hbm: Bytes of memory of a chip; None where they are not known.
        peaks: Peaks of a chip; None where they are not known.
        devices: Devices to compile for; empty where there is no compiler.
        slices: Number of slices of TPUs, which a network joins.
    """

    topology: str
    chips: int
    hbm: float | None
    peaks: Chip | None
    devices: tuple[Any, ...]
    slices: int = 1

    def mesh(self, options: MeshOptions) -> Mesh | AbstractMesh:
        """The mesh that a run there has; an abstract one where there are no devices.

        Raises:
            UserError: there are fewer chips, or slices would share parameters.
        """
        shape = mesh_shape(options, self.chips, self.slices)
        if not self.devices:
            kinds = (AxisType.Auto,) * len(MESH_AXES)
            return AbstractMesh(shape, MESH_AXES, axis_types=kinds)
        return arrange(self.devices[: math.prod(shape)], shape)


def read_target(topology: str) -> Target:
    """What a name stands for.

    Args:
        topology: Such as ``v5p:4x4x8``, ``2xv5e:4x4`` for two slices, ``cpu:8``, ``h100:8`` or
            ``gpu:8x80``.

    Raises:
        UserError: it stands for nothing, or its compiler is not installed.
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
