"""The settings files that come with the project are settings of their commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.cli import COMMANDS
from train.config import check_settings
from train.config.command_line import configured
from train.optimizers.check import check_optimizer

CONFIGS = Path(__file__).parents[2] / "train/configs"
OPTIMIZERS = ("adamw", "on_dare", "on_ties")
SMALL = (*OPTIMIZERS, "keep_largest")


def parse(command, *files, **fields):
    flags = [flag for file in files for flag in ("--config", str(CONFIGS / f"{file}.yaml"))]
    flags += [flag for name, value in fields.items() for flag in (f"--{name}", value)]
    config = configured(command, COMMANDS[command].config, flags)
    check_settings(config)
    check_optimizer(config.optimizer)
    return config


@pytest.mark.parametrize("optimizer", SMALL)
@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "simpo"])
def test_small_runs(loss, optimizer):
    command = "kto" if loss == "kto" else "dpo"
    fields = {"model.path": "sft", "data.path": "pairs.jsonl", "output_dir": "out"}
    config = parse(command, f"smollm2_{loss}", f"smollm2_{optimizer}", **fields)
    assert config.optimizer.name == optimizer
    assert config.loss.type == {"dpo": "sigmoid"}.get(loss, loss)
    assert config.trainer.steps == 60


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_online_run(optimizer):
    fields = {"model.path": "sft", "data.path": "prompts.jsonl", "output_dir": "out"}
    fields |= {"reward.function": "module:function"}
    config = parse("online-dpo", "online_dpo", f"smollm2_{optimizer}", **fields)
    assert config.optimizer.name == optimizer
    assert config.sampling.max_new_tokens == 48


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grpo_run(optimizer):
    fields = {"model.path": "sft", "data.path": "questions.jsonl", "output_dir": "out"}
    fields |= {"reward.function": "[module:correct, module:brevity]"}
    config = parse("grpo", "grpo", f"smollm2_{optimizer}", **fields)
    assert config.optimizer.name == optimizer
    assert config.reward.names == ("correct", "brevity")
    assert (config.sampling.num_generations, config.loss.type) == (8, "dapo")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["qwen1.5-1.8b", "qwen1.5-7b", "llama-3-8b"])
def test_the_papers_runs(model, optimizer):
    config = parse("dpo", f"paper_{model}", f"paper_{optimizer}", output_dir="out")
    assert (config.trainer.batch_size, config.loss.beta) == (128, 0.1)
    assert config.optimizer.learning_rate in (5e-6, 1e-6, 5e-7, 1e-7)
    assert config.model.path.lower().replace("meta-", "").split("/")[1].startswith(model)


def test_every_file_is_named_here_or_in_the_readme():
    known = {f"smollm2_{name}" for name in ("dpo", "ipo", "kto", "simpo", "sft", "eval", *SMALL)}
    known |= {f"paper_{n}" for n in ("qwen1.5-1.8b", "qwen1.5-7b", "llama-3-8b", *OPTIMIZERS)}
    known |= {"taxbench-demo", "online_dpo", "grpo"}
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == known
