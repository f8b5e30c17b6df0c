"""Groups of processes that run one command together, on one machine, over gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Runs a command; the process that `WOUND` names sends itself a signal when it has the batch of a step.
PROGRAM = """
import os, sys
import train.cli
process, step, number = map(int, os.environ.get("WOUND", "-1 0 0").split())
if process == int(os.environ["JAX_PROCESS_ID"]):
    import train.training.loop
    real, batches = train.training.loop.put_batch, iter(range(1, 999))
    def put_batch(batch, mesh):
        if next(batches) == step:
            os.kill(os.getpid(), number)
        return real(batch, mesh)
    train.training.loop.put_batch = put_batch
sys.exit(train.cli.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Wound:
    """A signal that one process sends itself.

    Attributes:
        process: Which one.
        step: When it has the batch of this step, counted from where it started.
        number: The signal.
    """

    process: int
    step: int
    number: signal.Signals


@dataclass(frozen=True)
class Ended:
    """One process that has ended.

    Attributes:
        status: Its exit status, negative for a signal.
        log: What it printed.
        seconds: When it ended, after the first one that did.
    """

    status: int
    log: str
    seconds: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_group(
    folder: Path,
    arguments: Sequence[str],
    *,
    processes: int,
    devices: int,
    wound: Wound | None = None,
    program: str = PROGRAM,
    timeout: float = 300,
) -> list[Ended]:
    """Runs a program in several processes; kills what is left after `timeout` seconds.

    Args:
        folder: For logs.
        arguments: Of the program, the same for all.
        processes: How many.
        devices: Virtual devices of all of them together.
        wound: A signal to one of them.
        program: What each one runs.
        timeout: In seconds, for all.
    """
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(processes),
    }
    if wound is not None:
        environment["WOUND"] = f"{wound.process} {wound.step} {int(wound.number)}"
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"log.{number}" for number in range(processes)]
    running = []
    for number, path in enumerate(logs):
        with path.open("w") as log:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-c", program, *arguments],
                    env={**environment, "JAX_PROCESS_ID": str(number)},
                    stdout=log,
                    stderr=log,
                )
            )
    ended: dict[int, float] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(ended) < processes and time.monotonic() < deadline:
            for number, process in enumerate(running):
                if number not in ended and process.poll() is not None:
                    ended[number] = time.monotonic()
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
            process.wait()
    first = min(ended.values(), default=deadline)
    return [
        Ended(process.returncode, path.read_text(), ended.get(number, deadline) - first)
        for number, (process, path) in enumerate(zip(running, logs, strict=True))
    ]


def statuses(group: Sequence[Ended]) -> list[int]:
    """Exit statuses of a group, for messages with the end of every log."""
    found = [one.status for one in group]
    if any(found):
        for number, one in enumerate(group):
            print(f"--- process {number}: {one.status}\n{one.log[-2500:]}")
    return found
