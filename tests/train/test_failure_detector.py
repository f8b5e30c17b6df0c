"""The end of a process is told to all others, by name; here threads and one process stand for them."""

import json
import queue
import signal
import subprocess
import sys
import threading

import pytest

from train.distributed.failure_detector import FailureDetector, Listener

NAMES = ["host a, pid 1", "host b, pid 2", "host c, pid 3"]
CHILD = """
import json, sys, time
from train.distributed.failure_detector import FailureDetector
detector = FailureDetector(["host a, pid 1", "host b, pid 2", "host c, pid 3"], 2, 10)
assert detector.connect(json.loads(sys.argv[1]), 10)
print("connected", flush=True)
time.sleep(60)
"""


@pytest.fixture
def three():
    """Three connected processes, and what each is told of the end of another."""
    told = [queue.Queue() for _ in NAMES]
    detectors = [
        FailureDetector(NAMES, n, 10, lambda *said, n=n: told[n].put(said)) for n in range(3)
    ]
    listener = Listener(["nowhere.invalid", "127.0.0.1"])
    accepting = threading.Thread(target=detectors[0].accept, args=(listener, 10))
    accepting.start()
    assert all(one.connect(listener.address, 10) for one in detectors[1:])
    accepting.join(30)
    yield detectors, told
    for one in detectors:
        one.close()


def test_an_error_of_any_process_is_told_to_the_others(three):
    detectors, told = three
    detectors[2].fail("the disk is full.", 2)
    for number in (0, 1):
        message, status = told[number].get(timeout=10)
        assert status == 2
        expected = "process 2 of 3 (host c, pid 3) ended with an error: the disk is full. "
        assert message.startswith(expected)
        assert "the same command goes on from the last checkpoint" in message
    assert told[2].empty()


def test_an_error_of_the_first_one_too(three):
    detectors, told = three
    detectors[0].fail("no", 1)
    for number in (1, 2):
        message, status = told[number].get(timeout=10)
        assert message.startswith("process 0 of 3 (host a, pid 1) ended with an error: no. ")
        assert status == 1


def test_after_the_end_of_the_run_nothing_is_told(three):
    detectors, told = three
    for one in (detectors[1], detectors[0], detectors[2]):
        one.close()
    for one in detectors:
        for connection in one._connections.values():
            connection.close()
    with pytest.raises(queue.Empty):
        told[0].get(timeout=0.5)
    assert all(one.empty() for one in told)


def test_a_killed_process_is_named_at_once():
    told = [queue.Queue() for _ in range(2)]
    detectors = [
        FailureDetector(NAMES, n, 10, lambda *said, n=n: told[n].put(said)) for n in range(2)
    ]
    listener = Listener(["127.0.0.1"])
    missing = []
    accepting = threading.Thread(target=lambda: missing.append(detectors[0].accept(listener, 60)))
    accepting.start()
    assert detectors[1].connect(listener.address, 10)
    command = [sys.executable, "-c", CHILD, json.dumps(listener.address)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "connected\n"
        accepting.join(60)
        assert missing == [[]]
        child.send_signal(signal.SIGKILL)
        for one in told:
            message, status = one.get(timeout=10)
            assert status == 75
            assert message.startswith("process 2 of 3 (host c, pid 3) is gone: it was killed")


def test_processes_that_do_not_connect_are_listed():
    listener = Listener([])
    detectors = FailureDetector(NAMES, 0, 10)
    assert detectors.accept(listener, 0.2) == [1, 2]
    assert not FailureDetector(NAMES, 1, 10).connect(listener.address, 1)
