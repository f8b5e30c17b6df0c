"""The processes of a run meet before JAX starts, so that a missing one has a name.

JAX's own service ends a process with a stack trace when the others do not come. This asks first, on
the same port: process 0 waits for the others, which say who they are and how many they expect.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

from train.config import UserError


class RendezvousTimeout(UserError):
    """Processes have not come in time: they may be late, or the settings may be wrong."""


def rendezvous(address: str, processes: int, process: int, timeout: float) -> None:
    """Returns when all processes have come.

    Raises `RendezvousTimeout` where some have not come, which every one that has come is told, or this
    one does not reach process 0; `UserError` where two have the same number or expect different ones.
    """
    deadline = time.monotonic() + timeout
    if process == 0:
        problem, late = _wait_for_others(address, processes, timeout, deadline)
    else:
        problem, late = _report_to_first(address, processes, process, timeout, deadline)
    if problem is not None:
        raise RendezvousTimeout(problem) if late else UserError(problem)


def _wait_for_others(
    address: str, processes: int, timeout: float, deadline: float
) -> tuple[str | None, bool]:
    """The problem, if any, and whether it is that some are late; the others are told of it too."""
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(address))
        problem, late = None, False
        while problem is None and len(came) < processes - 1:
            server.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(server.accept()[0])
            except (TimeoutError, BlockingIOError):
                problem, late = _missing(came, processes, timeout), True
            else:
                problem = _register(connection, came, processes)
        for connection in came.values():
            with contextlib.suppress(OSError):
                send(connection, {"problem": problem, "late": late})
        if problem is None:
            # They close first, and leave the port to JAX's service.
            for connection in came.values():
                with contextlib.suppress(OSError):
                    connection.settimeout(5)
                    connection.recv(1)
        return problem, late


def _listen(address: str) -> socket.socket:
    port = int(address.rpartition(":")[2])
    dual: dict[str, Any] = {}
    if socket.has_dualstack_ipv6():
        dual = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    try:
        return socket.create_server(("", port), backlog=1024, **dual)
    except OSError as error:
        raise UserError(
            f"distributed.coordinator_address {address!r}: process 0 cannot listen on port {port} "
            f"({error.strerror}); choose a free port."
        ) from error


def _register(
    connection: socket.socket, came: dict[int, socket.socket], processes: int
) -> str | None:
    """Adds a process to those that have come; returns what is wrong with it, if anything."""
    connection.settimeout(5)
    try:
        said = _receive(connection)
        process, expects = int(said["process"]), int(said["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a stranger on this port
    twice = process in came or process == 0
    came[-1 if twice else process] = connection  # it too is told
    if expects != processes:
        return (
            f"distributed.num_processes is {expects} on process {process} (host {said['host']}) and "
            f"{processes} on process 0; give the same number everywhere."
        )
    if twice:
        return f"distributed.process_id {process} is that of two processes; give each its own."
    return None


def _missing(came: dict[int, socket.socket], processes: int, timeout: float) -> str:
    missing = [str(number) for number in range(1, processes) if number not in came]
    listed = ", ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
    which = "process" if len(missing) == 1 else "processes"
    return (
        f"{which} {listed} of {processes} did not come within {timeout:.0f} s (distributed.timeout). "
        "Look at their logs, and whether distributed.coordinator_address can be reached from there."
    )


def _report_to_first(
    address: str, processes: int, process: int, timeout: float, deadline: float
) -> tuple[str | None, bool]:
    """The problem that process 0 reports, if any, and whether it is that some are late."""
    with _connect(address, timeout, deadline) as connection:
        try:
            me = {"process": process, "processes": processes, "host": socket.gethostname()}
            send(connection, me)
            # Process 0 may wait as long as this one did, and answers only then.
            connection.settimeout(max(1.0, deadline - time.monotonic()) + timeout)
            answer = _receive(connection)
            return answer["problem"], answer["late"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RendezvousTimeout(
                f"process 0 at {address} ended, or is no process of this run ({error}); look at "
                "its log."
            ) from error


def _connect(address: str, timeout: float, deadline: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    place = host.strip("[]"), int(port)
    while True:
        try:
            return socket.create_connection(place, max(1.0, deadline - time.monotonic()))
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousTimeout(
                    f"distributed.coordinator_address {address} cannot be reached within "
                    f"{timeout:.0f} s (distributed.timeout): {error.strerror or error}. Start process "
                    "0 there, or give the address where it runs."
                ) from error
        time.sleep(0.2)


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends one message as a line of JSON."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Reads a line of JSON; raises `ValueError` where the other side closed or sent anything else."""
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline(65536))
