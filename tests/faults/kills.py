"""SIGKILL at random points, and SIGTERM."""

from __future__ import annotations

import itertools
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.faults.rig import EVERY, Outcome, Rig, complete, damaged, is_clear, send

MOMENTS = ("at any time", "between steps", "during a save", "at any time", "during the export")


def kill(rig: Rig, count: int, seed: int) -> Outcome:
    """Kills `count` times; a run that gets to its end is compared, and another one is begun."""
    outcome = Outcome(
        "kill",
        "SIGKILL at random times, after random steps, during a save, during the export",
        "the same command goes on; result equal bit for bit",
    )
    rng, hit, finished = np.random.default_rng(seed), Counter[str](), 0
    output = rig.directory / "killed-0"
    for moment in itertools.cycle(MOMENTS):
        before = max(complete(output), default=0)
        due = _moment(rig, output, moment, rng)
        status, shown, acted = rig.disturb(output, due, send(signal.SIGKILL))
        outcome.check(is_clear(shown), f"traceback: {shown[-300:]}")
        if acted and status == -signal.SIGKILL:
            outcome.tries += 1
            hit[moment] += 1
            outcome.check(max(complete(output), default=0) >= before, "a checkpoint was lost")
            outcome.failures += damaged(output)
        if outcome.tries == count:
            break
        if status == 0:
            finished += 1
            _compare(rig, output, outcome)
            output = rig.directory / f"killed-{finished}"
    status, shown = rig.finish(output)
    outcome.check(status == 0, f"status {status}: {shown[-300:]}")
    _compare(rig, output, outcome)
    moments = ", ".join(f"{number} {moment}" for moment, number in hit.items())
    outcome.detail = f"{moments}; {finished + 1} runs, all equal"
    return outcome


def _moment(rig: Rig, output: Path, moment: str, rng: np.random.Generator) -> Callable[[], bool]:
    if moment == "at any time":
        deadline = time.monotonic() + rng.uniform(0, rig.seconds)
        return lambda: time.monotonic() >= deadline
    if moment == "between steps":
        step = max(complete(output), default=0) + int(rng.integers(1, 2 * EVERY))
        return lambda: rig.steps_logged(output) >= step
    # Somewhere in the milliseconds that it takes.
    delay, seen = rng.uniform(0, 0.03), list[float]()
    pattern = "checkpoints/*tmp*" if moment == "during a save" else ".export.partial-*"

    def due() -> bool:
        if any(output.glob(pattern)) and not seen:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() >= seen[0] + delay

    return due


def _compare(rig: Rig, output: Path, outcome: Outcome) -> None:
    difference = rig.differences(output)
    outcome.check(difference is None, f"{output.name}: {difference}")


def terminate(rig: Rig, count: int, seed: int) -> Outcome:
    """Sends SIGTERM after random steps until the run is done."""
    outcome = Outcome(
        "spot machine taken away",
        "SIGTERM after random steps",
        "step saved, status 75; the same command goes on; result equal bit for bit",
    )
    rng, output, stops = np.random.default_rng(seed), rig.directory / "terminated", list[int]()
    while outcome.tries < count:
        last = max(complete(output), default=0)
        step = last + int(rng.integers(1, max(2, rig.steps // count)))
        status, shown, acted = rig.disturb(
            output, lambda step=step: rig.steps_logged(output) >= step, send(signal.SIGTERM)
        )
        if not acted or status == 0:
            break
        outcome.tries += 1
        stops.append(max(complete(output), default=0))
        outcome.check(status == 75, f"status {status}: {shown[-300:]}")
        message = f"Stopped and saved after step {stops[-1]} of {rig.steps}"
        outcome.check(message in " ".join(shown.split()), f"no {message!r} in {shown[-300:]}")
        outcome.check(is_clear(shown), f"traceback: {shown[-300:]}")
        outcome.failures += damaged(output)
    status, shown = rig.finish(output)
    outcome.check(status == 0, f"status {status}: {shown[-300:]}")
    _compare(rig, output, outcome)
    outcome.detail = f"stopped after steps {', '.join(map(str, stops))}"
    return outcome
