"""The devices and processes of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import ranges


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How many devices split what; their product is the number of devices that are used.

    Attributes:
        data: Groups of devices that each hold the whole model between them, and a part of every
            batch. Slices of TPUs that a network joins are such groups, so with several of them it is
            a multiple of their number. Unset: that number, 1 on a single slice and on GPUs.
        fsdp: Devices over which parameters, optimizer state and delta are split, and batches too.
            Unset: all the devices that `data` and `tensor` leave.
        tensor: Devices over which heads, feed-forward channels and vocabulary are split, and the
            sequence between the layers. Keep it within the fastest links.
    """

    data: ranges.PositiveInt | None = None
    fsdp: ranges.PositiveInt | None = None
    tensor: ranges.PositiveInt = 1


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """The processes of one run. On Cloud TPU, GKE, Slurm and Open MPI nothing has to be set.

    Attributes:
        mode: auto joins the other processes where a cluster or the fields below say that there are
            some; off runs as a single process whatever the environment says.
        coordinator_address: HOST:PORT of process 0, for machines without a scheduler. Unset:
            JAX_COORDINATOR_ADDRESS, or what the cluster says.
        num_processes: Number of processes. Unset: JAX_NUM_PROCESSES, or what the cluster says.
        process_id: Number of this process, from 0. Unset: JAX_PROCESS_ID, or what the cluster says.
        timeout: Seconds that the processes wait for each other at the start.
        heartbeat_timeout: Seconds without a sign of life after which a process counts as gone, and
            the others stop. The end of a process is noticed at once.
    """

    mode: Literal["auto", "off"] = "auto"
    coordinator_address: str | None = None
    num_processes: ranges.PositiveInt | None = None
    process_id: ranges.NonNegativeInt | None = None
    timeout: ranges.PositiveInt = 300
    heartbeat_timeout: ranges.TenOrMore = 30
