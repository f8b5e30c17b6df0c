"""Batches that are not finite."""

from __future__ import annotations

import json

from tests.faults.rig import Outcome, Rig, complete, damaged, is_clear

# Makes the reference log-probabilities of some steps NaN, as a broken cache or kernel would.
PROGRAM = """
import sys
import numpy as np
import train.training.loop
from train.cli import main
bad, numbers, put = {bad}, iter(range(1, 10**6)), train.training.loop.put_batch
def put_batch(batch, mesh):
    factor = np.float32(np.nan if next(numbers) in bad else 1)
    name = "reference_chosen_logps"
    return put({{**batch, name: batch[name] * factor}}, mesh)
train.training.loop.put_batch = put_batch
sys.exit(main(sys.argv[1:]))
"""


def one_bad_batch(rig: Rig) -> Outcome:
    """NaN in two batches."""
    outcome = Outcome(
        "NaN batch",
        "reference log-probabilities of steps 5 and 11 are NaN",
        "both skipped, counted and warned about; the run ends well",
        tries=2,
    )
    output = rig.directory / "nan"
    status, shown = rig.finish(output, PROGRAM.format(bad={5, 11}))
    outcome.check(status == 0, f"status {status}: {shown[-300:]}")
    outcome.check(is_clear(shown), f"traceback: {shown[-300:]}")
    outcome.check(" ".join(shown.split()).count("steps skipped up to step") == 2, "no warnings")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    outcome.check(last["skipped_steps"] == 2, f"skipped_steps is {last['skipped_steps']}")
    outcome.check(0 < last["loss"] < 10, f"the last loss is {last['loss']}")
    outcome.detail = f"skipped_steps {last['skipped_steps']:.0f}, last loss {last['loss']:.3g}"
    return outcome


def only_bad_batches(rig: Rig) -> Outcome:
    """NaN from some step on."""
    outcome = Outcome(
        "NaN in every batch from a step on",
        "reference log-probabilities from step 7 on are NaN",
        "status 2 with a message after trainer.max_skipped_steps; checkpoints stay; goes on",
        tries=1,
    )
    output = rig.directory / "all-nan"
    status, shown = rig.finish(output, PROGRAM.format(bad=f"range(7, {rig.steps + 1})"))
    message = "the last 11 steps up to step 17 were not finite (loss nan"
    outcome.check(status == 2, f"status {status}: {shown[-300:]}")
    outcome.check(message in " ".join(shown.split()), f"no {message!r} in {shown[-300:]}")
    outcome.check(is_clear(shown), f"traceback: {shown[-300:]}")
    outcome.check(not (output / "export").exists(), "there is an export")
    outcome.check(complete(output), "no checkpoint is left")
    outcome.failures += damaged(output)
    status, shown = rig.finish(output)
    outcome.check(status == 0, f"status {status} without NaN: {shown[-300:]}")
    outcome.detail = "stopped at step 17, went on without NaN"
    return outcome
