"""Processes meet before JAX starts; here threads stand for them."""

import socket
import threading
import time

import pytest

from train.config import UserError
from train.distributed.rendezvous import RendezvousTimeout, rendezvous


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def barrier(*expecting, timeout=20.0):
    """Calls the roll for `(number, processes expected)` each; what each one saw, in order."""
    address, seen = f"127.0.0.1:{free_port()}", [None] * len(expecting)

    def come(index, process, processes):
        try:
            rendezvous(address, processes, process, timeout)
            seen[index] = "met"
        except RendezvousTimeout as error:
            seen[index] = f"late: {error}"
        except UserError as error:
            seen[index] = str(error)

    threads = [
        threading.Thread(target=come, args=(index, *one)) for index, one in enumerate(expecting)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return seen


def test_all_come_in_any_order_and_the_port_is_free_again():
    assert barrier((2, 3), (0, 3), (1, 3)) == ["met"] * 3
    port = free_port()
    first = threading.Thread(target=rendezvous, args=(f"127.0.0.1:{port}", 2, 0, 20))
    first.start()
    rendezvous(f"127.0.0.1:{port}", 2, 1, 20)
    first.join(60)
    socket.create_server(("", port)).close()


def test_those_that_did_not_come_are_named_to_those_that_did():
    start = time.monotonic()
    seen = barrier((0, 4), (2, 4), timeout=1.5)
    assert time.monotonic() - start < 10
    for message in seen:
        assert message.startswith("late: processes 1, 3 of 4 did not come within 2 s")


def test_processes_that_expect_other_numbers_are_told():
    for message in barrier((0, 2), (1, 3)):
        assert "distributed.num_processes is 3 on process 1" in message
        assert "2 on process 0" in message


def test_two_processes_with_one_number_are_told():
    for message in barrier((0, 3), (1, 3), (1, 3)):
        assert message.startswith("distributed.process_id 1 is that of two processes")


def test_an_address_where_nobody_is_ends_in_time():
    with pytest.raises(RendezvousTimeout, match=r"127.0.0.1:\d+ cannot be reached within 1 s"):
        rendezvous(f"127.0.0.1:{free_port()}", 2, 1, 1)


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="process 0 cannot listen on port"):
            rendezvous(address, 2, 0, 5)


def test_strangers_are_ignored():
    port = free_port()
    first = threading.Thread(target=rendezvous, args=(f"127.0.0.1:{port}", 2, 0, 20))
    first.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), 5) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        except OSError:
            time.sleep(0.05)
    rendezvous(f"127.0.0.1:{port}", 2, 1, 20)
    first.join(60)
    assert not first.is_alive()
