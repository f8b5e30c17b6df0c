"""Joins the processes of a run, before JAX is used, and leaves them again.

One host and many go the same way: a run is within `joined`, which does nothing where neither the
settings nor the environment say that there are other processes (`train.distributed.clusters`).
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from train.config import DistributedOptions, UserError, check_settings
from train.distributed.clusters import Group, find_group
from train.distributed.failure_detector import FailureDetector, Listener
from train.distributed.rendezvous import RendezvousTimeout, rendezvous
from train.distributed.stop import EXIT_STATUS, Stopped, TryAgain

# Seconds for the connections of the failure detector.
_CONNECT_S = 10.0
# An error here may be the first sign that another process is gone; its name follows within seconds.
_BLAME_S = 5.0
# What JAX says where hosts, their names or a cluster's server are not there yet.
_LATE = (
    "DEADLINE_EXCEEDED",
    "Failed to recognize coordinator address",
    "Getting metadata[",
    "Retry failed with all attempts",
)


@contextlib.contextmanager
def joined(options: DistributedOptions) -> Iterator[None]:
    """Joins the processes of a run; within it, `jax.devices()` are those of all of them.

    When this process ends with an error, the others are told, and when another one ends, this one
    stops with a message that names it.

    Raises `UserError` where the processes cannot be joined, and `TryAgain` where a cluster started them
    and they did not find each other in time.
    """
    check_settings(options, "distributed")
    group = find_group(options, os.environ)
    if group is None:
        yield
        return
    _initialise(group, options)
    detector = _detect_failures(group, options.heartbeat_timeout)
    from train.distributed.processes import barrier

    try:
        yield
    except Stopped:
        detector.close()
        raise
    except BaseException as error:
        _fail(detector, error)
        raise
    # While failures are still detected: at the end of a process JAX waits for five minutes.
    barrier("end of the run")
    detector.close()


def _initialise(group: Group, options: DistributedOptions) -> None:
    import jax

    # Its handler would swallow a SIGTERM before training has its own, see `train.distributed.stop`.
    jax.config.update("jax_enable_preemption_service", False)
    if group.explicit:
        assert group.address is not None
        assert group.processes is not None
        assert group.process is not None
        print(
            f"Process {group.process} of {group.processes}, by way of {group.address} ...",
            file=sys.stderr,
        )
        try:
            rendezvous(group.address, group.processes, group.process, options.timeout)
        except RendezvousTimeout as error:
            if group.cluster is None:
                raise
            raise TryAgain(str(error)) from error
    local = None if "JAX_LOCAL_DEVICE_IDS" in os.environ else group.local
    try:
        jax.distributed.initialize(
            group.address,
            group.processes,
            group.process,
            local_device_ids=local,
            cluster_detection_method="deactivate" if group.explicit else None,
            initialization_timeout=options.timeout,
            heartbeat_timeout_seconds=options.heartbeat_timeout,
        )
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        if group.cluster == "Cloud TPU" and "coordinator_address" in str(error):
            return  # a single machine with a TPU, of which no server knows more
        if group.cluster is not None and any(words in str(error) for words in _LATE):
            raise TryAgain(
                f"the processes of {group.cluster} did not find each other within {options.timeout} s "
                f"(distributed.timeout): {error}"
            ) from error
        raise UserError(
            f"the processes of {group.cluster or group.address} could not be joined ({error}). Set "
            "distributed.coordinator_address, num_processes and process_id, or distributed.mode off "
            "for a single process."
        ) from error


def _detect_failures(group: Group, silence: float) -> FailureDetector:
    """Connects every process to the first one."""
    import jax

    from train.distributed.processes import from_each

    mine, count = jax.process_index(), jax.process_count()
    if group.processes is not None and group.processes != count:
        raise UserError(
            f"distributed.num_processes is {group.processes}, but jax sees {count} processes; with "
            "JAX_PLATFORMS cpu, set jax_cpu_collectives_implementation to gloo."
        )
    names = from_each(f"host {socket.gethostname()}, pid {os.getpid()}")
    detector = FailureDetector(names, mine, silence)
    if count == 1:
        return detector
    listener = Listener(_own_names(group)) if mine == 0 else None
    address = from_each(None if listener is None else listener.address)[0]
    if listener is None:
        detector.connect(address, _CONNECT_S)
    elif missing := detector.accept(listener, _CONNECT_S):
        print(
            f"Warning: no connection from process {', '.join(map(str, missing))}; their end will "
            f"be noticed after {silence:.0f} s by JAX's heartbeats alone.",
            file=sys.stderr,
        )
    return detector


def _own_names(group: Group) -> list[str]:
    """Names and addresses of this host, which others may reach it by."""
    names = [] if group.address is None else [group.address.rpartition(":")[0].strip("[]")]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; asks which address has the way out
        names.append(probe.getsockname()[0])
    return [*names, socket.gethostname()]


def _fail(detector: FailureDetector, error: BaseException) -> None:
    """Tells the others, and makes sure that this process does not wait for them at its end."""
    status = 1
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, UserError) or full:
        status = 2  # as `train.cli` answers
    elif isinstance(error, TryAgain):
        status = EXIT_STATUS
    elif isinstance(error, KeyboardInterrupt):
        status = 130
    else:
        time.sleep(_BLAME_S)
    detector.fail(" ".join(str(error).split())[:400] or type(error).__name__, status)
    # Registered last, it runs before JAX's own, which meets the others. Before that Python waits for
    # threads, and one of Orbax may wait for the others.
    atexit.register(_leave, status)
    threading.Thread(target=_leave_after_main, args=(status,), daemon=True).start()


def _leave_after_main(status: int) -> None:
    threading.main_thread().join()
    _leave(status)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
