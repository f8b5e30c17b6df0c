"""The end of a process is told to all others, by name; here threads and one process stand for them."""

import queue
import signal
import subprocess
import sys
import threading

import pytest

from train.distributed.peers import Door, Peers

NAMES = ["host a, pid 1", "host b, pid 2", "host c, pid 3"]
CHILD = """
import sys, time
from train.distributed.peers import Peers
peers = Peers(["host a, pid 1", "host b, pid 2", "host c, pid 3"], 2, 10)
assert peers.connect(sys.argv[1], 10)
print("connected", flush=True)
time.sleep(60)
"""


@pytest.fixture
def three():
    """Three connected processes, and what each is told of the end of another."""
    told = [queue.Queue() for _ in NAMES]
    peers = [Peers(NAMES, n, 10, lambda *said, n=n: told[n].put(said)) for n in range(3)]
    door = Door(["nowhere.invalid", "127.0.0.1"])
    accepting = threading.Thread(target=peers[0].accept, args=(door, 10))
    accepting.start()
    assert all(one.connect(door.address, 10) for one in peers[1:])
    accepting.join(30)
    yield peers, told
    for one in peers:
        one.close()


def test_an_error_of_any_process_is_told_to_the_others(three):
    peers, told = three
    peers[2].fail("the disk is full.", 2)
    for number in (0, 1):
        message, status = told[number].get(timeout=10)
        assert status == 2
        expected = "process 2 of 3 (host c, pid 3) ended with an error: the disk is full. "
        assert message.startswith(expected)
        assert "the same command goes on from the last checkpoint" in message
    assert told[2].empty()


def test_an_error_of_the_first_one_too(three):
    peers, told = three
    peers[0].fail("no", 1)
    for number in (1, 2):
        message, status = told[number].get(timeout=10)
        assert message.startswith("process 0 of 3 (host a, pid 1) ended with an error: no. ")
        assert status == 1


def test_after_the_end_of_the_run_nothing_is_told(three):
    peers, told = three
    for one in (peers[1], peers[0], peers[2]):
        one.close()
    for one in peers:
        for connection in one._connections.values():
            connection.close()
    with pytest.raises(queue.Empty):
        told[0].get(timeout=0.5)
    assert all(one.empty() for one in told)


def test_a_killed_process_is_named_at_once():
    told = [queue.Queue() for _ in range(2)]
    peers = [Peers(NAMES, n, 10, lambda *said, n=n: told[n].put(said)) for n in range(2)]
    door = Door(["127.0.0.1"])
    missing = []
    accepting = threading.Thread(target=lambda: missing.append(peers[0].accept(door, 60)))
    accepting.start()
    assert peers[1].connect(door.address, 10)
    command = [sys.executable, "-c", CHILD, door.address]
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
    door = Door([])
    peers = Peers(NAMES, 0, 10)
    assert peers.accept(door, 0.2) == [1, 2]
    assert not Peers(NAMES, 1, 10).connect(door.address, 1)
