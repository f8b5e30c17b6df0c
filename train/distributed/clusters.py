"""Whether this process is one of several, from the settings and the environment alone.

What is found here decides whether `jax.distributed.initialize` is called; the addresses of clusters
are then found by JAX itself. Nothing here asks the network, so a single host never waits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import DistributedOptions, UserError


@dataclass(frozen=True)
class Cluster:
    """The launcher or cluster that started this process; None stands for what it does not tell."""

    name: str  # for messages
    processes: int | None = None  # how many there are
    process: int | None = None  # number of this one
    local: int | None = None  # number of this process, and of its GPU, on its host
    finds_coordinator: bool = True  # whether JAX finds the address of process 0


@dataclass(frozen=True)
class Group:
    """The processes to join. None stands for what JAX finds out."""

    address: str | None  # HOST:PORT of process 0
    processes: int | None
    process: int | None  # number of this one
    local: int | None  # number of its GPU on its host; None for all GPUs
    cluster: str | None  # name of what started them

    @property
    def explicit(self) -> bool:
        """Whether JAX has nothing left to find out."""
        return None not in (self.address, self.processes, self.process)


def find_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that the environment variables show, or None.

    Example:
        >>> find_cluster({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}).name
        'Open MPI'
    """
    given = environment.get
    if all(name in environment for name in _SLURM):
        processes, process, local = (int(environment[name]) for name in _SLURM[1:])
        return Cluster("Slurm", processes, process, local)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        numbers = (given(f"OMPI_COMM_WORLD_{name}") for name in _OMPI)
        processes, process, local = (int(number or 0) for number in numbers)
        # Open MPI 5 no longer says where mpirun runs.
        known = "OMPI_MCA_orte_hnp_uri" in environment
        return Cluster("Open MPI", processes, process, local, known)
    if _may_use_tpu(environment):
        workers = given("TPU_PROCESS_ADDRESSES") or given("TPU_WORKER_HOSTNAMES")
        if workers is not None:
            slices = int(given("MEGASCALE_NUM_SLICES") or 1)
            return Cluster("GKE", len(workers.split(",")) * slices)
        if "TPU_SKIP_MDS_QUERY" not in environment:
            return Cluster("Cloud TPU")
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        package = importlib.util.find_spec("kubernetes")
        return Cluster("a Kubernetes job", finds_coordinator=package is not None)
    return None


_SLURM = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_OMPI = ("SIZE", "RANK", "LOCAL_RANK")


def _may_use_tpu(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    chips = any(Path(place).exists() for place in ("/dev/accel0", "/dev/vfio/0"))
    return chips and importlib.util.find_spec("libtpu") is not None


def find_group(options: DistributedOptions, environment: Mapping[str, str]) -> Group | None:
    """The processes to join, or None for a single one.

    Raises `UserError` where the settings are not enough, or contradict themselves or the cluster.
    """
    address, processes, process = (_setting(options, environment, name) for name in _VARIABLES)
    if options.mode == "off":
        return None
    cluster = find_cluster(environment)
    if cluster is not None:
        processes = _agreed("num_processes", processes, cluster.processes, cluster.name)
        process = _agreed("process_id", process, cluster.process, cluster.name)
    if processes == 1:
        return None
    found = dict(zip(_VARIABLES, (address, processes, process), strict=True))
    if cluster is None or not cluster.finds_coordinator:
        if cluster is None and all(value is None for value in found.values()):
            return None
        _require_all(found, cluster)
    if address is not None:
        _check_address(address)
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(
            f"distributed.process_id must be in [0, {processes}), of distributed.num_processes "
            f"{processes}, got {process}."
        )
    local, name = (None, None) if cluster is None else (cluster.local, cluster.name)
    return Group(address, processes, process, local, name)


def _agreed(name: str, given: int | None, cluster: int | None, title: str) -> int | None:
    """The number that settings and cluster agree on."""
    if given is not None and cluster is not None and given != cluster:
        raise UserError(
            f"distributed.{name} is {given}, but {title} says {cluster}. Unset it, or start the "
            "processes otherwise."
        )
    return cluster if given is None else given


def _require_all(found: Mapping[str, object], cluster: Cluster | None) -> None:
    """Refuses settings of which some are missing where JAX cannot find them out."""
    missing = [name for name, value in found.items() if value is None]
    if not missing:
        return
    there = [name for name, value in found.items() if value is not None]
    listed = ", ".join(f"distributed.{name} (or {_VARIABLES[name]})" for name in missing)
    if cluster is None:
        why = f"distributed.{there[0]} is set, and no cluster was found that knows the rest"
    elif cluster.name == "Open MPI":
        why = "this version of Open MPI does not say where process 0 runs"
    else:
        why = (
            "this pod of an indexed Kubernetes job may be one of several, which the package "
            "`kubernetes` would tell (pip install 'jax[k8s]')"
        )
    alone = "" if cluster is None else " A single process needs distributed.mode off."
    raise UserError(f"{why}: give {listed}.{alone}")


_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def _setting(options: DistributedOptions, environment: Mapping[str, str], name: str) -> Any:
    """A setting, or else its environment variable; numbers as int."""
    value = getattr(options, name)
    if value is not None and options.mode == "off":
        raise UserError(f"distributed.{name} is {value!r}, but distributed.mode is off; unset one.")
    value = environment.get(_VARIABLES[name]) if value is None else value
    if value is None or name == "coordinator_address":
        return value
    if not str(value).isdecimal():
        raise UserError(f"{_VARIABLES[name]} must be a number, got {value!r}.")
    if name == "num_processes" and int(value) == 0:
        raise UserError("distributed.num_processes must be positive, got 0.")
    return int(value)


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            "distributed.coordinator_address must be HOST:PORT, the host of process 0 and a free "
            f"port there, got {address!r}."
        )
