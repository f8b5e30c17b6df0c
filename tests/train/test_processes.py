"""What processes tell each other: all of them have what the first one has."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.train.groups import run_group, statuses
from tests.train.tiny_rewards import write_reward_inputs
from tests.train.tiny_runs import flags, run_flags
from train.config import MeshOptions
from train.distributed.batches import agree_on_shared_rows
from train.distributed.mesh import make_mesh
from train.distributed.processes import from_each, from_first
from train.files.metrics_log import read_metrics

TOLD = """
from train.config import DistributedOptions, MeshOptions
from train.distributed.join import joined
with joined(DistributedOptions()):
    import jax
    import numpy as np
    from train.distributed.processes import from_each, from_first
    from train.distributed.mesh import make_mesh
    from train.distributed.batches import row_numbers, agree_on_shared_rows
    mine = jax.process_index()
    assert from_each({"mine": "é" * mine}) == [{"mine": "é" * n} for n in range(4)]
    given = [{"a": 0.1, "long": "é" * 500}, {"a": 2.0}, None, []][mine]
    assert from_first(given) == {"a": 0.1, "long": "é" * 500}
    mesh = make_mesh(MeshOptions(fsdp=2, tensor=2))  # 0 and 1 share rows, and 2 and 3
    rows = np.arange(3.0)[:, None] * [1, np.nan] + mine + 1e-12
    expected = np.arange(3.0)[:, None] * [1, np.nan] + (mine // 2 * 2) + 1e-12
    np.testing.assert_array_equal(agree_on_shared_rows(rows, mesh), expected)
    np.testing.assert_array_equal(agree_on_shared_rows(rows, make_mesh(MeshOptions(fsdp=4))), rows)
"""

CUT_OFF = """
import sys
from pathlib import Path
from train.config import DistributedOptions
from train.distributed.join import joined
with joined(DistributedOptions()):
    import jax
    from train.training.loop import _rows_until
    # The second process sees the file as it was before the first one mended it.
    path = Path(sys.argv[1]) / f"metrics.{jax.process_index()}"
    found = _rows_until(2, path)
    assert found == [{"step": 1, "loss": 0.5}, {"step": 2, "eval_loss": 0.25}], found
    assert _rows_until(0, path) == []
"""

# The first process finds the model better at every evaluation, the second one worse.
MOODS = """
import itertools, os
mood = itertools.count()
def moody(completions, **kwargs):
    value = next(mood) * (1.0 if os.environ["JAX_PROCESS_ID"] == "0" else -1.0)
    return [value] * len(completions)
"""


@pytest.mark.slow
def test_what_the_first_process_tells_and_what_is_said_of_shared_rows(tmp_path):
    group = run_group(tmp_path, [], processes=4, devices=4, program=TOLD, timeout=120)
    assert statuses(group) == [0] * 4


@pytest.mark.slow
def test_a_line_that_a_kill_cut_off_is_read_by_no_process(tmp_path):
    whole = '{"step": 1, "loss": 0.5}\n{"step": 2, "eval_loss": 0.25}\n'
    (tmp_path / "metrics.0").write_text(whole)
    (tmp_path / "metrics.1").write_text(whole + '{"step": 3, "lo')
    group = run_group(
        tmp_path, [str(tmp_path)], processes=2, devices=2, program=CUT_OFF, timeout=120
    )
    assert statuses(group) == [0, 0]


def test_a_single_process_keeps_what_it_has():
    rows = np.arange(8.0)
    assert from_first({"a": 1}) == {"a": 1}
    assert from_each({"a": 1}) == [{"a": 1}]
    for options in (MeshOptions(fsdp=1), MeshOptions(fsdp=1, tensor=min(2, jax.device_count()))):
        np.testing.assert_array_equal(agree_on_shared_rows(rows, make_mesh(options)), rows)


@pytest.mark.slow
def test_processes_whose_rewards_differ_decide_alike(tmp_path, monkeypatch):
    inputs = write_reward_inputs(tmp_path, MOODS)
    settings: dict[str, Any] = {
        "data.path": inputs["prompts"],
        "data.max_completion_length": None,
        "sampling.max_new_tokens": 4,
        "reward.function": "tiny_task:moody",
        "trainer.steps": 4,
        "trainer.eval_every": 1,
        "trainer.export_best": "eval_objective/scores",
        "mesh.tensor": 2,
    }
    given = dict(zip(*[iter(run_flags(inputs, tmp_path / "run"))] * 2, strict=True))
    values = {name[2:]: value for name, value in given.items()} | settings
    monkeypatch.setenv("PYTHONPATH", inputs["python"], prepend=":")
    group = run_group(
        tmp_path / "logs", ["online-dpo", *flags(values)], processes=2, devices=2, timeout=240
    )
    assert statuses(group) == [0, 0]
    scores = {
        row["step"]: row["eval_objective/scores"]
        for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "eval_objective/scores" in row
    }
    assert list(scores) == [0, 1, 2, 3, 4]
    assert sorted(scores.values()) == list(scores.values())
