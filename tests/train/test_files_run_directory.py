"""What a directory holds, and that nothing in it is ever overwritten."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.train.builders import GOOD
from train.config import DPOConfig, UserError
from train.config.command_line import configured
from train.files.run_directory import open_output


def at(path, **changes) -> DPOConfig:
    return dataclasses.replace(GOOD, output_dir=str(path), **changes)


def test_new_directory_appears_only_when_the_run_begins(tmp_path):
    output = open_output("dpo", at(tmp_path / "new" / "run"))
    assert not output.started
    assert not output.path.exists()
    output.begin(at(output.path), {"model": "abc"})
    again = open_output("dpo", at(output.path))
    assert again.started
    assert again.summary is None


def test_settings_can_be_used_again(tmp_path):
    config = at(tmp_path / "run", reference_cache="cache")
    open_output("dpo", config).begin(config, {})
    assert configured("dpo", DPOConfig, ["--config", str(tmp_path / "run/config.yaml")]) == config


def test_empty_directory_and_remains_of_a_kill_are_taken(tmp_path):
    (tmp_path / ".run.json.partial-host-12-0123abcd").write_text("{")
    assert not open_output("dpo", at(tmp_path)).started


def test_summary_marks_the_end(tmp_path):
    output = open_output("dpo", at(tmp_path))
    output.begin(at(tmp_path), {})
    output.finish({"steps": 10})
    assert open_output("dpo", at(tmp_path)).summary == {"steps": 10}


def test_fields_that_change_nothing_learned_may_change(tmp_path):
    open_output("dpo", at(tmp_path)).begin(at(tmp_path), {})
    trainer = dataclasses.replace(GOOD.trainer, save_every=5, log_every=2, keep=7, eval_every=3)
    assert open_output("dpo", at(tmp_path, trainer=trainer)).started


def saved_something(path):
    (path / "checkpoints" / "3").mkdir(parents=True)


def test_another_run_is_named_by_its_first_differences(tmp_path):
    open_output("dpo", at(tmp_path)).begin(at(tmp_path), {})
    saved_something(tmp_path)
    optimizer = dataclasses.replace(GOOD.optimizer, learning_rate=1e-5, weight_decay=0.1)
    trainer = dataclasses.replace(GOOD.trainer, batch_size=8, seed=3)
    with pytest.raises(UserError) as caught:
        open_output("dpo", at(tmp_path, optimizer=optimizer, trainer=trainer))
    message = str(caught.value)
    assert "trainer.batch_size was 4, now 8; trainer.seed was 0, now 3" in message
    assert "optimizer.learning_rate was 1e-06, now 1e-05; and 1 more" in message
    with pytest.raises(UserError, match="command was 'dpo', now 'sft'"):
        open_output("sft", at(tmp_path))


def test_changed_inputs_are_named(tmp_path):
    open_output("dpo", at(tmp_path)).begin(at(tmp_path), {"model": "abc", "data": "123"})
    saved_something(tmp_path)
    output = open_output("dpo", at(tmp_path))
    output.begin(at(tmp_path), {"model": "abc", "data": "123"})
    with pytest.raises(UserError, match="holds a run whose data had other content than now"):
        output.begin(at(tmp_path), {"model": "abc", "data": "124"})


@pytest.mark.parametrize("change", ["settings", "inputs"])
def test_a_run_that_saved_nothing_makes_room_and_is_kept(change, tmp_path):
    first = at(tmp_path)
    open_output("dpo", first).begin(first, {"data": "123"})
    before = (tmp_path / "run.json").read_text()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "reference").mkdir()
    other = dataclasses.replace(GOOD.trainer, batch_size=8)
    second = first if change == "inputs" else at(tmp_path, trainer=other)
    output = open_output("dpo", second)
    aside = output.begin(second, {"data": "124"})
    assert aside == tmp_path / "before-1"
    assert (aside / "run.json").read_text() == before
    assert (aside / "metrics.jsonl").read_text() == '{"step": 0}\n'
    assert not (tmp_path / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "run.json").read_text())["inputs"] == {"data": "124"}
    assert open_output("dpo", second).started
    # Killed while making room: what was moved does not keep the next one out.
    (tmp_path / "run.json").unlink()
    assert not open_output("dpo", second).started
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_output("dpo", second)


def test_foreign_files_are_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and holds no run \(found 'notes.txt'\)"):
        open_output("dpo", at(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_file_in_place_of_the_directory(tmp_path):
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file; choose a directory"):
        open_output("dpo", at(file))


def test_place_that_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    message = r"output_dir '.*file/run' cannot be written \(Not a directory\); choose a place"
    with pytest.raises(UserError, match=message):
        open_output("dpo", at(file / "run"))
    output = open_output("dpo", at(tmp_path / "late" / "run"))
    (tmp_path / "late").write_text("mine")  # in the way since the check
    with pytest.raises(UserError, match=r"late/run' cannot be written \(Not a directory\)"):
        output.begin(at(output.path), {})

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("train.files.whole.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        open_output("dpo", at(tmp_path))


def test_damaged_record(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json cannot be read as a run's record"):
        open_output("dpo", at(tmp_path))
