"""Signals: noted once, at once the second time, and agreed on by all processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from train.distributed.stop import StopSignals

SECOND = """
import os, signal
from train.distributed.stop import StopSignals
with StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not here", flush=True)
"""
# The second of two processes gets the signal in step 2; both stop after the same step.
AGREE = """
import os, signal, sys
import jax
from train.distributed.stop import StopSignals
address, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, process)
with StopSignals() as signals:
    for step in range(1, 9):
        if process == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if signals.agreed():
            break
print("stopped after", step)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noted_and_handlers_come_back(number, capfd):
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    with StopSignals() as signals:
        assert not signals.agreed()
        os.kill(os.getpid(), number)
        assert signals.agreed()
        assert signals.received == number
    assert {one: signal.getsignal(one) for one in before} == before
    assert f"{number.name}: saving after this step" in capfd.readouterr().err


def test_second_signal_ends_the_process():
    done = subprocess.run(
        [sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "still here\n"
    assert "SIGTERM: exiting at once" in done.stderr


def test_outside_the_main_thread_nothing_happens():
    errors = []

    def work():
        try:
            with StopSignals() as signals:
                assert not signals.agreed()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_processes_stop_after_the_same_step():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, address, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    results = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert [out.splitlines()[-1] for out, _ in results] == ["stopped after 3"] * 2
