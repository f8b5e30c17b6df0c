"""How the processes of one run find each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config.ranges import NonNegativeInt, PositiveInt, TenOrMore


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
    num_processes: PositiveInt | None = None
    process_id: NonNegativeInt | None = None
    timeout: PositiveInt = 300
    heartbeat_timeout: TenOrMore = 30
