"""Runs of a tiny model in processes of their own, and how to tell that one lost nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.train.tiny_runs import read_tensors, run_flags, write_inputs
from train.files.checksums import find_damage

STEPS, EVERY = 40, 4
SETTINGS = {
    "trainer__steps": STEPS,
    "trainer__save_every": EVERY,
    "trainer__eval_every": 10,
    "optimizer__delta_mask": "fresh",
}
TIMEOUT = 600
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Outcome:
    """A row of the table.

    Attributes:
        fault: What went wrong.
        how: How it was brought about.
        tries: How often.
        expected: What is to become of it.
        failures: What became of it otherwise, in words.
        detail: What was seen, in words.
    """

    fault: str
    how: str
    expected: str
    tries: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    detail: str = ""

    def check(self, condition: object, failure: str) -> None:
        if not condition:
            self.failures.append(failure)


class Rig:
    """Inputs of the runs, and one run that nothing happened to.

    Args:
        directory: For everything; absent or empty.
        steps: Length of a run.
    """

    def __init__(self, directory: Path, steps: int = STEPS) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.steps = directory, steps
        self.inputs = write_inputs(directory)
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # So that most of a run is not its compilation.
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        self.whole = directory / "undisturbed"
        status, shown = self.finish(self.whole)
        assert status == 0, shown
        started = time.monotonic()
        self.finish(directory / "timed")
        self.seconds = time.monotonic() - started

    def command(self, output: Path) -> list[str]:
        return [
            "dpo",
            *run_flags(self.inputs, output, **(SETTINGS | {"trainer__steps": self.steps})),
        ]

    def start(self, output: Path, program: str | None = None) -> subprocess.Popen[str]:
        """Starts a run; with a program, Python code that ends by running `sys.argv[1:]`."""
        how = ["-m", "train"] if program is None else ["-c", program]
        return subprocess.Popen(
            [sys.executable, *how, *self.command(output)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )

    def finish(self, output: Path, program: str | None = None) -> tuple[int, str]:
        """Runs to the end; the exit status and what was shown."""
        process = self.start(output, program)
        shown, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, shown

    def disturb(
        self, output: Path, due: Callable[[], bool], action: Callable[[subprocess.Popen[str]], None]
    ) -> tuple[int, str, bool]:
        """Runs until `due()`, then acts; the exit status, what was shown, and whether it acted."""
        process = self.start(output)
        deadline, acted = time.monotonic() + TIMEOUT, False
        while process.poll() is None and not acted:
            assert time.monotonic() < deadline
            if due():
                action(process)
                acted = True
            time.sleep(0.001)
        shown, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, shown, acted

    def steps_logged(self, output: Path) -> int:
        file = output / "metrics.jsonl"
        return file.read_bytes().count(b'"loss"') if file.exists() else 0

    def differences(self, output: Path) -> str | None:
        """How the result differs from that of the undisturbed run, in words, or None."""
        expected, found = read_tensors(self.whole / "export"), read_tensors(output / "export")
        if expected.keys() != found.keys():
            return "the export has other tensors"
        for name, tensor in expected.items():
            if not np.array_equal(tensor, found[name]):
                return f"tensor {name} of the export differs"
        if _rows(self.whole) != _rows(output):
            return "metrics.jsonl differs"
        return None


def _rows(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in row.items() if name != "tokens_per_second"} for row in rows]


def complete(output: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    places = (output / "checkpoints").glob("*")
    return sorted(int(path.name) for path in places if path.name.isdecimal())


def damaged(output: Path) -> list[str]:
    """Damage of complete checkpoints, in words."""
    found = {step: find_damage(output / "checkpoints" / str(step)) for step in complete(output)}
    return [f"checkpoint {step}: {damage}" for step, damage in found.items() if damage is not None]


def is_clear(shown: str) -> bool:
    """Whether what a run shows holds no traceback."""
    return "Traceback" not in shown


def send(number: signal.Signals) -> Callable[[subprocess.Popen[str]], None]:
    """An action for `Rig.disturb`."""
    return lambda process: process.send_signal(number)
