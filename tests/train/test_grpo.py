"""``grpo`` as a command: it learns a task, resumes bit for bit, and refuses bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.train.tiny_rewards import write_reward_inputs
from tests.train.tiny_runs import flags, read_tensors
from tests.virtual_devices import run_python
from train.cli import main
from train.distributed.stop import EXIT_STATUS

REWARDS = """
import os, signal

def early_letters(completions, **kwargs):
    texts = [one[0]["content"] for one in completions]
    return [sum("a" <= c <= "m" for c in text) / max(1, len(text)) for text in texts]

def even_only(completions, n, **kwargs):
    return [None if one % 2 else float(len(text[0]["content"])) for one, text in zip(n, completions)]

def stops_the_run(completions, **kwargs):
    if any(one[0]["content"] for one in completions):
        os.kill(os.getpid(), signal.SIGTERM)
    return early_letters(completions)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_reward_inputs(tmp_path_factory.mktemp("inputs"), REWARDS)


@pytest.fixture(autouse=True)
def importable(inputs, monkeypatch):
    monkeypatch.syspath_prepend(inputs["python"])
    yield
    sys.modules.pop("tiny_task", None)


def grpo_flags(inputs, output, **changes):
    values = {
        "model.path": inputs["model"],
        "model.base": inputs["base"],
        "data.path": inputs["prompts"],
        "data.max_prompt_length": 64,
        "data.buckets": 1,
        "sampling.max_new_tokens": 6,
        "sampling.num_generations": 4,
        "reward.function": "tiny_task:early_letters",
        "optimizer.name": "on_dare",
        "optimizer.learning_rate": 1e-3,
        "optimizer.alpha": 1e-3,
        "optimizer.density": 0.5,
        "trainer.batch_size": 4,
        "trainer.steps": 4,
        "output_dir": output,
    }
    return ["grpo", *flags(values | {k.replace("__", "."): v for k, v in changes.items()})]


def timeless(run: Path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


@pytest.mark.slow
def test_answers_are_reused_and_a_resumed_run_ends_the_same(inputs, tmp_path, capsys):
    """With two rewards, one of which does not always apply, a reference, parts and OnDARE."""
    run = tmp_path / "run"
    changes = {"sampling__num_iterations": 2, "trainer__save_every": 2, "data__eval_fraction": 0.2}
    changes |= {"loss__beta": 0.1, "trainer__gradient_accumulation_steps": 2}
    changes |= {"reward__function": "[tiny_task:early_letters, tiny_task:even_only]"}
    changes |= {"reward__weights": "[1.0, 0.1]", "optimizer__learning_rate": 3e-2}
    arguments = grpo_flags(inputs, run, **changes)
    assert main(arguments) == 0
    logged, exported = timeless(run), read_tensors(run / "export")
    steps = [row for row in logged if "loss" in row]
    of_answers = [
        {k: v for k, v in row.items() if k.startswith(("reward", "completions/"))} for row in steps
    ]
    assert of_answers[0] == of_answers[1] != of_answers[2] == of_answers[3]
    # On policy nothing is clipped; after one large step on the same answers something is.
    clipped = [row["clip_ratio/region_mean"] for row in steps]
    assert clipped[0] == clipped[2] == 0 < min(clipped[1], clipped[3])
    assert abs(steps[0]["kl"]) < 1e-5 < steps[1]["kl"]
    assert {"rewards/even_only/mean", "rewards/early_letters/std", "entropy"} < steps[0].keys()
    assert {"eval_reward", "eval_rewards/even_only/mean"} < logged[-1].keys()
    assert steps[-1]["merge/alpha_total"] == pytest.approx(4e-3)

    (run / "summary.json").unlink()
    for gone in (run / "checkpoints/4", run / "export"):
        shutil.rmtree(gone)
    assert main(arguments) == 0
    assert "Resuming after step 2 of 4" in capsys.readouterr().out
    assert timeless(run) == logged
    again = read_tensors(run / "export")
    assert all((exported[name] == again[name]).all() for name in exported)


def test_a_signal_counts_where_new_answers_are_sampled(inputs, tmp_path, capfd):
    run = tmp_path / "run"
    changes = {"sampling__num_iterations": 2, "reward__function": "tiny_task:stops_the_run"}
    changes |= {"optimizer__name": "adamw", "optimizer__alpha": None, "optimizer__density": None}
    before = signal.getsignal(signal.SIGTERM)
    assert main(grpo_flags(inputs, run, **changes, model__base=None)) == EXIT_STATUS
    assert signal.getsignal(signal.SIGTERM) == before
    assert "Stopped and saved after step 2 of 4" in capfd.readouterr().err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "on_ties"])
def test_reward_rises(optimizer, inputs, tmp_path, capsys):
    run = tmp_path / "run"
    changes = {"trainer__steps": 60, "trainer__batch_size": 8, "data__eval_fraction": 0.2}
    changes |= {"optimizer__learning_rate": 3e-3, "sampling__num_generations": 8}
    if optimizer == "adamw":
        changes |= {"optimizer__alpha": None, "optimizer__density": None, "model__base": None}
    assert main(grpo_flags(inputs, run, **changes, optimizer__name=optimizer)) == 0
    assert "?' → '" in capsys.readouterr().out  # a held-out prompt with its answer
    logged = timeless(run)
    rewards = np.array([row["reward"] for row in logged if "loss" in row])
    assert rewards[-8:].mean() > rewards[:8].mean() + 0.3
    assert logged[-1]["eval_reward"] > rewards[:8].mean() + 0.3


@pytest.mark.slow
def test_four_devices_sample_and_learn_like_one(inputs, tmp_path):
    logs = {}
    for count in (1, 4):
        run = tmp_path / str(count)
        fields = {"reward__model": inputs["reward"], "data__eval_fraction": 0.2}
        fields |= {"loss__beta": 0.1, "sampling__num_iterations": 2}
        fields |= {"trainer__gradient_accumulation_steps": 2}
        path = os.pathsep.join([inputs["python"], os.environ.get("PYTHONPATH", "")])
        arguments = grpo_flags(inputs, run, **fields)
        run_python("-m", "train", *arguments, devices=count, PYTHONPATH=path)
        logs[count] = timeless(run)
    for one, four in zip(*logs.values(), strict=True):
        assert one.keys() == four.keys()
        for name, value in one.items():
            # Whether a ratio near a bound is beyond it is up to rounding.
            if not name.startswith("clip_ratio/"):
                assert four[name] == pytest.approx(value, rel=1e-2, abs=1e-3), name


def test_dry_run_counts_steps_and_batches(inputs, tmp_path, capsys):
    changes = {"trainer__steps": None, "trainer__epochs": 2, "sampling__num_iterations": 3}
    assert main(grpo_flags(inputs, tmp_path / "run", dry_run="true", **changes)) == 0
    assert "36 steps of 4 rows, 2 epochs" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward__function": None}, "Give reward.function or reward.model, or both."),
        ({"reward__function": "tiny_task:nothing"}, "has no function 'nothing'"),
        (
            {"reward__function": "[tiny_task:even_only, other:even_only]"},
            "have 'even_only' more than once",
        ),
        (
            {"reward__weights": "[1.0, 2.0]"},
            "reward.weights must be 1 numbers, one for each of ear",
        ),
        (
            {
                "reward__multi_objective_aggregation": "normalize_then_sum",
                "reward__scale_rewards": "none",
            },
            "reward.scale_rewards is none, which normalize_then_sum has no use for",
        ),
        ({"reward__weights": "[.inf]"}, "reward.weights[0] must be finite, got inf"),
        ({"reward__model": "nowhere"}, "reward.model: nowhere is not an"),
        ({"sampling__num_generations": 1}, "sampling.num_generations must be 2 or larger, got 1"),
        ({"sampling__num_iterations": 0}, "sampling.num_iterations must be positive, got 0"),
        ({"sampling__num_iterations": 3}, "trainer.steps must be a multiple of sampling.num_iter"),
        (
            {"sampling__num_iterations": 2, "trainer__save_every": 3},
            "trainer.save_every must be a multiple of sampling.num_iterations, 2, got 3",
        ),
        ({"sampling__temperature": 0.0}, "sampling.temperature must be positive, got 0.0"),
        (
            {"trainer__gradient_accumulation_steps": 3},
            "trainer.batch_size * sampling.num_generations must be a multiple of 3",
        ),
        ({"loss__beta": -1.0}, "loss.beta must be 0 or larger, got -1.0"),
        ({"loss__type": "cispo"}, "loss: epsilon_high must be set with type cispo"),
        ({"model__base": None}, "model.base is not set; on_dare merges with the delta"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    changes, message, inputs, tmp_path, capsys
):
    assert main(grpo_flags(inputs, tmp_path / "run", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
