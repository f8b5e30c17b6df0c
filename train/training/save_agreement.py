"""Processes that save together learn from each other that a save has failed, and share checksums.

Orbax lets them wait for each other three times in the background. A process that fails, on a full
disk for instance, does not come, and the others would wait until Orbax's time is over.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.files.checksums import Checksums

_saves = itertools.count()
_WRITTEN = "async_write_complete"
"""Part of Orbax's name of the barrier to which a process comes when its own files are written."""


class SaveFailedElsewhere(Exception):
    """A save failed on other processes; the message has their words."""


class SaveAgreement:
    """Takes the place of Orbax's barriers of a save (`orbax.checkpoint.AsyncOptions.barrier_sync_fn`).

    A process that has failed says so, comes to the barrier where the others are, and then all fail:
    `failed` is True on each, and none waits for another one in this save any more. Each process calls
    `hash_own` once its own files are complete, so that all processes hash theirs at the same time.
    """

    def __init__(self, hash_own: Callable[[], Checksums]) -> None:
        self.failed = False
        self._hash_own = hash_own
        self._place, self._count = "", 0

    def begin(self) -> None:
        """Starts a new save; all processes call this."""
        self.failed, self._place, self._count = False, f"omerge_save/{next(_saves)}", 0

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the other processes, for `timeout_ms` at most.

        Orbax calls this in ``finally`` too, where an exception that is being raised is this process's
        failure. `key` is Orbax's name of the barrier. The barrier has another name here, because a
        process that has failed comes to a later one of Orbax's than the others.

        Raises `SaveFailedElsewhere` where another process has failed and this one has not;
        `jax.errors.JaxRuntimeError` where the others have not come in time; and what `hash_own` raises
        where this process cannot read its files.
        """
        if jax.process_count() == 1 or self.failed:
            return
        client, me = _client(), jax.process_index()
        error = sys.exc_info()[1]
        unreadable: Exception | None = None
        if error is None and _WRITTEN in key:
            try:
                client.key_value_set(f"{self._place}/checksums/{me}", json.dumps(self._hash_own()))
            except Exception as caught:
                error = unreadable = caught
        if error is not None:
            client.key_value_set(f"{self._place}/failed/{me}", f"process {me}: {brief(error)}")
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"{self._place}/{self._count}", timeout_ms=timeout_ms)
        self._count += 1
        found = client.key_value_dir_get(f"{self._place}/failed/")
        self.failed = bool(found)
        if unreadable is not None:
            raise unreadable
        if found and error is None:
            raise SaveFailedElsewhere("; ".join(words for _, words in sorted(found)))

    def checksums(self) -> Checksums:
        """Collects the checksums that the processes have computed; the first process calls this."""
        found: Checksums = {}
        if jax.process_count() > 1:
            client = _client()
            for number in range(jax.process_count()):  # one by one: a message has a largest size
                key = f"{self._place}/checksums/{number}"
                found |= json.loads(client.key_value_try_get(key))
                client.key_value_delete(key)  # the store is in memory and outlives the save
        return found


def brief(error: BaseException) -> str:
    """The operating system's words for an error where it has them, otherwise its first line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is not None:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)


def _client() -> Any:
    """The processes' store of short texts, which needs no device: threads may use it."""
    from jax._src import distributed  # Orbax too finds no public way to it

    return distributed.global_state.client
