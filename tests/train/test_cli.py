"""The command line: help, mistakes, and settings from files and flags."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.train.tiny_runs import flags
from train.cli import COMMANDS, main
from train.config import DPOConfig, EvalConfig, SFTConfig
from train.config.command_line import configured

REQUIRED_FLAGS = flags(
    {
        "output_dir": "out",
        "model.path": "sft",
        "data.path": "pairs.jsonl",
        "optimizer.learning_rate": 1e-6,
        "trainer.batch_size": 4,
    }
)


def test_overview_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert set(COMMANDS) >= {"sft", "dpo", "eval", "export", "fetch-smollm2", "demo"}


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from train.cli import main; main(['--help']); "
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'grain', 'orbax'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_command(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_unknown_command(capsys):
    assert main(["tune"]) == 2
    assert "error: no command 'tune'; choose one of sft, dpo" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sft", "dpo", "eval", "export", "demo", "fetch-smollm2"])
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: python -m train {command}" in capsys.readouterr().out


def test_docstrings_are_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["dpo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--optimizer.density DENSITY Share of the entries that are kept, in (0, 1]." in shown
    assert "--trainer.batch_size BATCH_SIZE" in shown


def test_ranges_and_defaults_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["dpo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "in (0, 1]. (type: float in (0, 1] | null, default: null)" in shown
    assert "(type: float in (0, 1], default: 0.6)" in shown  # ref_model_mixup_alpha
    assert "over all devices. (required, type: int > 0)" in shown


def test_settings_hold_plain_numbers():
    more = flags({"data.mix": "{maths.jsonl: 2}", "optimizer.alpha": "1", "loss.vocab_chunk": 7})
    config = configured("dpo", DPOConfig, [*REQUIRED_FLAGS, *more])
    numbers = (config.trainer.batch_size, config.loss.vocab_chunk, config.trainer.keep)
    assert {type(number) for number in numbers} == {int}
    numbers = (config.optimizer.alpha, config.data.mix["maths.jsonl"], config.loss.beta)
    assert {type(number) for number in numbers} == {float}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--optimizer.alfa", "1"], "--optimizer.alfa"),
        (["--optimizer.alpha", "much"], 'Parser key "optimizer.alpha"'),
        (["--optimizer.name", "adam"], "'on_dare_adamw'"),
        (["--trainer.steps", "2.5"], 'Parser key "trainer.steps"'),
        (["--trainer.steps", "true"], 'Parser key "trainer.steps"'),
        (["--optimizer.density", "half"], 'Parser key "optimizer.density"'),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        ([], "data.path"),
    ],
)
def test_mistakes_in_flags(mistake, message, capsys):
    alone = not mistake or mistake[0] == "--config"
    given = mistake if alone else [*REQUIRED_FLAGS, *mistake]
    with pytest.raises(SystemExit) as caught:
        main(["dpo", *given])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_unknown_field_in_a_file(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: sft, bass: x}\n")
    with pytest.raises(SystemExit) as caught:
        main(["dpo", "--config", str(file)])
    assert caught.value.code == 2
    assert "Group 'model' does not accept option 'bass'" in capsys.readouterr().err


def test_file_and_flags_fill_the_same_fields(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: out\nmodel: {path: sft}\ndata: {path: pairs.jsonl}\n"
        "optimizer: {learning_rate: 1e-6}\ntrainer: {batch_size: 4}\n"
    )
    from_file = configured("dpo", DPOConfig, ["--config", str(file)])
    assert from_file == configured("dpo", DPOConfig, REQUIRED_FLAGS)
    assert from_file.optimizer.learning_rate == 1e-6
    changed = configured("dpo", DPOConfig, ["--config", str(file), "--optimizer.alpha", "5e-7"])
    assert changed.optimizer.alpha == 5e-7
    assert changed.trainer == from_file.trainer


def test_sft_knows_no_merging():
    config = configured("sft", SFTConfig, REQUIRED_FLAGS)
    assert not hasattr(config.optimizer, "alpha")
    assert not hasattr(config.model, "base")


def test_task_paths_as_flags(tmp_path):
    file = tmp_path / "eval.yaml"
    file.write_text(
        "tasks:\n  svamp: {path: none, prompt: '{Body}', answer: '{Answer:g}', choices: 3}\n"
    )
    given = {"tasks.svamp.path": "svamp.jsonl.gz", "model": "sft", "output": "results.json"}
    config = configured("eval", EvalConfig, ["--config", str(file), *flags(given)])
    assert config.tasks["svamp"].path == "svamp.jsonl.gz"
    assert config.tasks["svamp"].choices == 3
    assert config.preferences is None


def test_fetch_refuses_a_directory_with_content(tmp_path, capsys):
    (tmp_path / "weights.bin").write_text("precious")
    assert main(["fetch-smollm2", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
