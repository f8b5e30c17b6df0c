"""``online-dpo`` as a command: it learns a task, resumes bit for bit, and refuses bad input."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from tests.train.builders import save_reward_model
from tests.train.tiny_rewards import write_reward_inputs
from tests.train.tiny_runs import flags, read_tensors
from tests.virtual_devices import run_python
from train.cli import main

REWARDS = """
def early_letters(prompts, completions, **kwargs):
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [sum("a" <= c <= "m" for c in text) / max(1, len(text)) for text in texts]

def fails_later(completions, **kwargs):
    return [0.0 if one[0]["content"] == "" else float("inf") for one in completions]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_reward_inputs(tmp_path_factory.mktemp("inputs"), REWARDS)


@pytest.fixture(autouse=True)
def importable(inputs, monkeypatch):
    monkeypatch.syspath_prepend(inputs["python"])
    yield
    sys.modules.pop("tiny_task", None)


def online_flags(inputs, output, **changes):
    values = {
        "model.path": inputs["model"],
        "model.base": inputs["base"],
        "data.path": inputs["prompts"],
        "data.max_prompt_length": 64,
        "data.buckets": 1,
        "sampling.max_new_tokens": 8,
        "sampling.temperature": 1.0,
        "reward.function": "tiny_task:early_letters",
        "optimizer.name": "on_dare",
        "optimizer.learning_rate": 1e-3,
        "optimizer.alpha": 1e-3,
        "optimizer.density": 0.5,
        "trainer.batch_size": 8,
        "trainer.steps": 3,
        "output_dir": output,
    }
    return ["online-dpo", *flags(values | {k.replace("__", "."): v for k, v in changes.items()})]


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def resumed(run, arguments, step, capsys):
    """Log and exported tensors after the last checkpoint is lost and the command given again."""
    (run / "summary.json").unlink()
    last = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for gone in (last, run / "export"):
        shutil.rmtree(gone)
    assert main(arguments) == 0
    assert f"Resuming after step {step} of {last.name}" in capsys.readouterr().out
    return timeless(run), read_tensors(run / "export")


def timeless(run):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows_of(run)]


@pytest.mark.slow
def test_reward_rises_and_a_resumed_run_ends_the_same(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    changes = {"trainer__steps": 80, "trainer__batch_size": 16, "data__eval_fraction": 0.2}
    changes |= {"optimizer__learning_rate": 3e-3, "loss__beta": 0.02, "trainer__save_every": 60}
    arguments = online_flags(inputs, run, **changes)
    assert main(arguments) == 0
    assert "?' → '" in capsys.readouterr().out  # a held-out prompt with its answer
    logged, exported = timeless(run), read_tensors(run / "export")
    scores = np.array([row["objective/scores"] for row in logged if "loss" in row])
    assert scores[-8:].mean() > scores[:8].mean() + 0.3
    assert logged[-1]["eval_objective/scores"] > scores[:8].mean() + 0.3
    again, tensors = resumed(run, arguments, 60, capsys)
    assert again == logged
    assert all((exported[name] == tensors[name]).all() for name in exported)


@pytest.mark.slow
def test_with_a_reward_model_frozen_weights_and_accumulation(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    changes = {"reward__function": None, "reward__model": inputs["reward"]}
    changes |= {"data__path": inputs["pairs"], "loss__type": "[ipo, sft]"}
    changes |= {"model__base": None, "model__trainable": "[down_proj]", "optimizer__name": "adamw"}
    changes |= {"optimizer__alpha": None, "optimizer__density": None}
    changes |= {"trainer__gradient_accumulation_steps": 2, "trainer__save_every": 1}
    arguments = online_flags(inputs, run, **changes)
    assert main(arguments) == 0
    assert "reward model" in json.loads((run / "run.json").read_text())["inputs"]
    logged, exported = timeless(run), read_tensors(run / "export")
    assert all(row["objective/scores_margin"] > 0 for row in logged)
    # A reference that had the policy's frozen weights and others besides would not start at 0.
    assert abs(logged[0]["objective/kl"]) < 1e-4 < logged[-1]["objective/kl"]
    again, tensors = resumed(run, arguments, 2, capsys)
    assert again == logged
    assert all((exported[name] == tensors[name]).all() for name in exported)


@pytest.mark.slow
def test_four_devices_sample_and_rank_like_one(inputs, tmp_path):
    logs = {}
    for count in (1, 4):
        run = tmp_path / str(count)
        fields = {"reward__function": None, "reward__model": inputs["reward"]}
        fields |= {"data__eval_fraction": 0.2}
        run_python("-m", "train", *online_flags(inputs, run, **fields), devices=count)
        logs[count] = timeless(run)
    for one, four in zip(*logs.values(), strict=True):
        assert one.keys() == four.keys()
        # Whether rewards of 0 are above each other is up to rounding.
        for name, value in ((k, v) for k, v in one.items() if k != "rewards/accuracies"):
            assert four[name] == pytest.approx(value, rel=1e-2, abs=1e-3), name


@pytest.mark.slow
def test_another_reward_model_is_another_run(inputs, tmp_path, capsys):
    run, reward = tmp_path / "run", tmp_path / "reward"
    shutil.copytree(inputs["reward"], reward)
    changes = {"reward__function": None, "reward__model": reward, "trainer__steps": 1}
    arguments = online_flags(inputs, run, **changes)
    assert main(arguments) == 0
    (run / "summary.json").unlink()
    save_reward_model(reward, seed=1)
    assert main(arguments) == 2
    assert "holds a run whose reward model had other content" in capsys.readouterr().err


def test_dry_run_shows_the_prompts(inputs, tmp_path, capsys):
    assert main(online_flags(inputs, tmp_path / "run", dry_run="true")) == 0
    shown = capsys.readouterr().out
    assert "Tokens of 24 training rows" in shown
    assert "0?" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward__function": None}, "Give exactly one of reward.function and reward.model."),
        ({"sampling__temperature": 0.0}, "sampling.temperature must be positive, got 0.0"),
        ({"sampling__max_new_tokens": 0}, "sampling.max_new_tokens must be positive, got 0"),
        (
            {"sampling__max_new_tokens": 250},
            "sampling.max_new_tokens is 314, but the model has 256",
        ),
        ({"sampling__top_p": 0.0}, "sampling.top_p must be in (0, 1], got 0.0"),
        ({"reward__missing_eos_penalty": -1}, "reward.missing_eos_penalty must be positive"),
        ({"reward__function": "tiny_task:nothing"}, "has no function 'nothing'"),
        ({"reward__function": None, "reward__model": "nowhere"}, "reward.model: nowhere is not an"),
        ({"loss__beta": 0.0}, "loss.beta must be positive"),
        ({"model__base": None}, "model.base is not set; on_dare merges with the delta"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    changes, message, inputs, tmp_path, capsys
):
    assert main(online_flags(inputs, tmp_path / "run", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_policy_is_no_reward_model(inputs, tmp_path, capsys):
    changes = {"reward__function": None, "reward__model": inputs["model"]}
    assert main(online_flags(inputs, tmp_path / "run", **changes)) == 2
    assert "reward.model: " in (message := capsys.readouterr().err)
    assert "a reward model is a …ForSequenceClassification" in message


def test_a_reward_that_breaks_later_ends_the_run_with_a_message(inputs, tmp_path, capsys):
    changes = {"reward__function": "tiny_task:fails_later"}
    assert main(online_flags(inputs, tmp_path / "run", **changes)) == 2
    assert "must return finite numbers, got inf for answer 0 of 16" in capsys.readouterr().err
