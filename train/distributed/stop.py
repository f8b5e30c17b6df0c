"""SIGTERM and SIGINT end a run after the step that is under way, with everything saved.

Cloud providers send SIGTERM some seconds before they take a machine away. All processes of a run
must stop after the same step, so each tells the others at every step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

EXIT_STATUS = 75
"""Exit status of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h."""


class Stopped(Exception):
    """A run was asked to stop and has saved its state; the message says how to go on."""


class TryAgain(Exception):
    """A run ended for a reason that another try may mend; the status is `EXIT_STATUS` too."""


class StopSignals:
    """While this context is open, the first SIGTERM or SIGINT is noted.

    A second signal ends the process at once, with the status 128 + its number; the files on disk are
    complete even then, as after SIGKILL. Outside the main thread, where Python handles no signals,
    nothing is noted.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._pending: Any = None

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread
                break
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = signal.Signals(number)
        what = (
            "exiting at once" if again else "saving after this step; a second signal exits at once"
        )
        # Not print, which may be in the middle of a line.
        os.write(2, f"\n{self.received.name}: {what}.\n".encode())
        if again:
            os._exit(128 + number)

    def agreed(self) -> bool:
        """Whether any process has received a signal; the same answer on all of them.

        All processes call this after every step. On several, the answer is the one of the step
        before, whose exchange is over by now, so that nobody waits.
        """
        import jax  # not at the top, so that the command line knows `Stopped` without it

        if jax.process_count() == 1:
            return self.received is not None
        from train.distributed.processes import true_anywhere

        previous, self._pending = self._pending, true_anywhere(self.received is not None)
        return previous is not None and bool(previous)
