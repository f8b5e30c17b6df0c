"""A second process on an output directory is refused; a killed one leaves no lock."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from train import lock
from train.config import UserError

HOLD = """
import pathlib, sys, time
from train import lock
lock.hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_process_is_refused_until_the_first_is_killed(tmp_path, other):
    message = rf"is in use by process {other.pid} on host {socket.gethostname()}, since .* choose"
    for attempt in (lock.hold, lock.refuse_if_held):
        with pytest.raises(UserError, match=message):
            attempt(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock.refuse_if_held(tmp_path)
    lock.hold(tmp_path)
    lock.hold(tmp_path)  # once more by the same process
    lock.refuse_if_held(tmp_path)
    lock.release(tmp_path)
    lock.release(tmp_path)


def test_lock_that_is_given_back_can_be_taken(tmp_path):
    lock.hold(tmp_path)
    command = [sys.executable, "-c", HOLD.replace("600", "0"), str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    refused = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert f"in use by process {os.getpid()}" in refused.stderr
    lock.release(tmp_path)
    allowed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert allowed.returncode == 0, allowed.stderr


def test_directory_that_was_made_anew_is_locked_anew(tmp_path):
    lock.hold(tmp_path)
    (tmp_path / lock.LOCK_FILE).unlink()
    lock.hold(tmp_path)
    assert (tmp_path / lock.LOCK_FILE).exists()
    lock.release(tmp_path)
