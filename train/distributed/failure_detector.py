"""Tells every process of a run at once, and by name, when another one ends before its time.

Each process holds a connection to the first one. The operating system closes it when the process
dies, however it dies, and keep-alive probes notice a host that vanishes. JAX's heartbeats stay as a
second line: they need longer and end the processes with a stack trace.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any

from train.distributed.rendezvous import send
from train.distributed.stop import EXIT_STATUS


def stop_at_once(message: str, status: int) -> None:
    """Ends this process, whatever it waits for."""
    os.write(2, f"\nerror: {message}\n".encode())
    os._exit(status)


_AGAIN = "This process stops too; the same command goes on from the last checkpoint."


class Listener:
    """A port of the first process to which the others connect, at any of the names of its host."""

    def __init__(self, host_names: Sequence[str]) -> None:
        self.server = socket.create_server(("", 0), backlog=1024)
        self.token = secrets.token_hex(8)
        self.address = [self.server.getsockname()[1], self.token, *host_names]
        """Port, token and names of the host: what the others need in order to connect."""


class FailureDetector:
    """The connections of process number `mine` to the others, which messages call by `names`.

    A host counts as gone after `silence` seconds without a sign of life. When another process has
    ended, `on_failure` is called in a thread of its own with a message and the exit status that this
    process should have: that of the other's error, or that of a run that can go on where the other is
    gone.
    """

    def __init__(
        self,
        names: Sequence[str],
        mine: int,
        silence: float,
        on_failure: Callable[[str, int], None] = stop_at_once,
    ) -> None:
        self._names, self._mine, self._silence = names, mine, silence
        self._on_failure = on_failure
        self._connections: dict[int, socket.socket] = {}
        self._closing = threading.Event()
        self._lock = threading.Lock()

    def accept(self, listener: Listener, timeout: float) -> list[int]:
        """Takes the connections of the others in, on the first process, within `timeout` seconds.

        Returns the processes that have not come, whose end heartbeats alone will notice.
        """
        with listener.server as server:
            server.settimeout(timeout)
            while len(self._connections) < len(self._names) - 1:
                try:
                    connection, _ = server.accept()
                except OSError:
                    break
                connection.settimeout(timeout)
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    # One reader for all that comes: what it has read ahead would be lost to another.
                    lines = connection.makefile("rb")
                    said = json.loads(lines.readline(4096))
                    if said["token"] == listener.token:
                        self._keep(said["process"], connection, lines)
        return [n for n in range(1, len(self._names)) if n not in self._connections]

    def connect(self, address: Sequence[Any], timeout: float) -> bool:
        """Connects to the `Listener.address` of the first process; returns whether it was reached.

        Each name of its host is tried for `timeout` seconds.
        """
        port, token, *hosts = address
        for host in hosts:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((host, port), timeout)
                send(connection, {"token": token, "process": self._mine})
                self._keep(0, connection, connection.makefile("rb"))
                return True
        return False

    def _keep(self, process: int, connection: socket.socket, lines: IO[bytes]) -> None:
        """Keeps a connection, and listens to it in a thread."""
        connection.settimeout(None)
        _keep_alive(connection, self._silence)
        self._connections[process] = connection
        threading.Thread(target=self._listen, args=(process, lines), daemon=True).start()

    def _listen(self, process: int, lines: IO[bytes]) -> None:
        said: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            said = json.loads(lines.readline() or b"{}")
        if self._closing.is_set() or said.get("done"):
            return
        if not said:
            message = f"{self._name(process)} is gone: it was killed, or its host is down. {_AGAIN}"
            said = {"ended": message, "status": EXIT_STATUS}
        self._tell(said)
        self._on_failure(said["ended"], said["status"])

    def fail(self, reason: str, status: int) -> None:
        """Tells the others that this process ends with an error, and with which status."""
        message = f"{self._name(self._mine)} ended with an error: {reason.rstrip('.')}. {_AGAIN}"
        self._tell({"ended": message, "status": status})

    def close(self) -> None:
        """Tells the others that the run is over: the end of a process is no failure any more."""
        self._tell({"done": True})

    def _name(self, process: int) -> str:
        return f"process {process} of {len(self._names)} ({self._names[process]})"

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._closing.set()
            for connection in self._connections.values():
                with contextlib.suppress(OSError):
                    send(connection, message)


def _keep_alive(connection: socket.socket, silence: float) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    step = max(1, int(silence / 4))
    for name, value in (("TCP_KEEPIDLE", step), ("TCP_KEEPINTVL", step), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere, or under another name
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
