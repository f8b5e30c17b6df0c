"""Short versions of what the campaign does at length and `tests/train` does not do elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.faults.rows import malformed_rows
from tests.faults.storage import every_file
from tests.train.tiny_runs import write_inputs


def test_malformed_rows_are_refused_with_their_line_or_counted(tmp_path):
    rig: Any = SimpleNamespace(directory=tmp_path, inputs=write_inputs(tmp_path))
    outcome = malformed_rows(rig, 150, seed=1)
    assert outcome.failures == []
    assert outcome.tries == 150
    assert "refused" in outcome.detail


def test_damage_to_any_file_of_a_checkpoint_is_survived(tmp_path):
    outcome = every_file(tmp_path)
    assert outcome.failures == []
    assert outcome.tries >= 30
