"""Processes that save together learn from each other that a save has failed.

Orbax lets them wait for each other three times in the background. Where one of them fails, on a full
disk for instance, it does not come, and the others wait until Orbax's time is over.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

_saves = itertools.count()


class SaveFailedElsewhere(Exception):
    """A save failed on other processes; the message has their words."""


class SaveAgreement:
    """Stands for Orbax's barriers of a save (`orbax.checkpoint.AsyncOptions.barrier_sync_fn`).

    A process that has failed says so, comes to the barrier where the others are, and then all fail.
    From then on no process waits for another one in this save.

    Attributes:
        failed: All processes know that the save has failed.
    """

    def __init__(self) -> None:
        self.failed = False
        self._place, self._count = "", 0

    def begin(self) -> None:
        """A new save; all processes call this."""
        self.failed, self._place, self._count = False, f"omerge_save/{next(_saves)}", 0

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Waits for the others.

        Orbax calls this in ``finally`` too, so an error on its way is one of this process.

        Args:
            key: Orbax's name of the barrier. Not used: the one where a process that has failed is
                missed has another name than the one where it comes.
            timeout_ms: To wait.

        Raises:
            SaveFailedElsewhere: another process has failed, and this one has not.
            jax.errors.JaxRuntimeError: the others have not come in time.
        """
        if jax.process_count() == 1 or self.failed:
            return
        client, error = _client(), sys.exc_info()[1]
        if error is not None:
            words = f"process {jax.process_index()}: {brief(error)}"
            client.key_value_set(f"{self._place}/failed/{jax.process_index()}", words)
        ocp.multihost.get_barrier_sync_fn()(
            key=f"{self._place}/{self._count}", timeout_ms=timeout_ms
        )
        self._count += 1
        found = client.key_value_dir_get(f"{self._place}/failed/")
        self.failed = bool(found)
        if found and error is None:
            raise SaveFailedElsewhere("; ".join(words for _, words in sorted(found)))


def brief(error: BaseException) -> str:
    """The operating system's words where an error has them, from under those of TensorStore."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is not None:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)


def _client() -> Any:
    """The processes' store of short texts, which needs no device and so may be used in a thread."""
    from jax._src import distributed  # Orbax too finds no public way to it

    return distributed.global_state.client
