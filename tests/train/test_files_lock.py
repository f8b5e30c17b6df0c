"""A second process on an output directory is refused; a killed one leaves no lock."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from train.config import UserError
from train.distributed.stop import TryAgain
from train.files import lock

HOLD = """
import pathlib, sys, time
from train.files import lock
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


@pytest.fixture
def elsewhere(other, tmp_path):
    """The same, as if it ran on a machine that has vanished: a file server holds its lock."""
    written = json.loads((tmp_path / lock.LOCK_FILE).read_text())
    gone = {**written, "machine": "gone"}
    (tmp_path / lock.LOCK_FILE).write_text(json.dumps(gone))
    return other


@pytest.mark.parametrize("attempt", [lock.hold, lock.refuse_if_held])
def test_a_job_started_again_waits_for_the_lock_of_another_machine(
    attempt, tmp_path, elsewhere, monkeypatch, capfd
):
    monkeypatch.setattr(lock, "_POLL_S", 0.1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    killing = threading.Timer(1.0, elsewhere.kill)
    killing.start()
    attempt(tmp_path)
    killing.join()
    lock.release(tmp_path)
    said = capfd.readouterr().err
    assert said.count(f"is in use by process {elsewhere.pid} on host ") == 1
    assert "waiting 180 s for it, which may be gone" in said


@pytest.mark.parametrize("attempt", [lock.hold, lock.refuse_if_held])
def test_it_may_be_tried_again_when_it_is_still_held(attempt, tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(lock, "_WAIT_S", 0.3)
    monkeypatch.setattr(lock, "_POLL_S", 0.1)
    with pytest.raises(UserError, match="Wait for it or stop it"):
        attempt(tmp_path)  # the first try of a single process
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(TryAgain, match=f"is in use by process {elsewhere.pid} on host .* goes on"):
        attempt(tmp_path)


def test_a_job_started_again_does_not_wait_for_a_process_of_this_machine(
    tmp_path, other, monkeypatch
):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UserError, match=f"is in use by process {other.pid}"):
        lock.hold(tmp_path)


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
