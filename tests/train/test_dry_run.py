"""A dry run shows what a run would do, reads no weight and writes nothing."""

from __future__ import annotations

import huggingface_hub
import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from tests.train.tiny_runs import flags, make_model_dir, make_records, run_flags, write_jsonl
from train.cli import main
from train.data import tokenize_preference
from train.runs.dry_run import show_examples

PLAIN = {
    "dry_run": "true",
    "optimizer__name": "adamw",
    "optimizer__alpha": None,
    "optimizer__density": None,
    "model__base": None,
}


@pytest.fixture
def inputs(tmp_path):
    records = make_records(30)
    records += [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b<|im_end|>c", "rejected": "b"},
    ]
    model = make_model_dir(tmp_path / "model")
    (model / "model.safetensors").unlink()
    return {"model": str(model), "pairs": str(write_jsonl(tmp_path / "pairs.jsonl", records))}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_statistics_and_examples_without_weights(inputs, tmp_path, capsys):
    arguments = run_flags(
        {**inputs, "base": ""}, tmp_path / "run", **PLAIN, data__eval_fraction=None
    )
    assert main(["dpo", *arguments]) == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    data = tokenize_preference(
        make_records(30), tokenizer, max_prompt_length=64, max_completion_length=16
    )
    prompts = data.arrays["prompt_mask"].sum(axis=1)
    lines = {
        line.split("│")[1].strip(): line.split("│")[2:-1]
        for line in shown.splitlines()
        if line.count("│") > 3
    }
    cells = [cell.strip() for cell in lines["prompt"]]
    assert cells[0] == f"{prompts.mean():.1f}"
    assert cells[1] == str(np.sort(prompts)[15])
    assert cells[-2:] == [str(prompts.max()), str(prompts.sum())]
    assert "Tokens of 30 training rows" in shown
    assert "the completion contains the end token" in shown
    assert "chosen and rejected are the same" in shown
    assert "prompts computed once for both answers" in shown
    assert "padding" in shown
    assert "6 steps of 8 rows" in shown
    assert "<|im_start|>assistant" in shown
    assert shown.index("row 0") < shown.index("chosen, ") < shown.index("row 1")


def test_what_the_loss_counts_is_green(inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    data = tokenize_preference(
        make_records(1), tokenizer, max_prompt_length=64, max_completion_length=16
    )
    console = Console(force_terminal=True, color_system="standard", width=100, record=True)
    with console.capture() as captured:
        show_examples(data, tokenizer, console)
    lines = captured.get().splitlines()
    answer = make_records(1)[0]["chosen"]
    green = [line for line in lines if "\x1b[32m" in line]
    assert any(f"\x1b[32m{answer}<|im_end|>" in line for line in green)
    assert len(green) == 2  # one line for each answer
    assert not any("user" in line or "<|im_start|>" in line for line in green)


def test_an_unreachable_hub_is_named_after_what_can_be_checked(
    inputs, tmp_path, capsys, monkeypatch
):
    def unreachable(*_, **__):
        raise ConnectionError("no route to huggingface.co")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    hub = {"model": "Qwen/Qwen1.5-1.8B-Chat", "base": ""}
    arguments = run_flags({**inputs, **hub}, tmp_path / "run", **PLAIN)
    assert main(["dpo", *arguments]) == 2
    captured = capsys.readouterr()
    assert "32 records, 1 of which cannot be used" in captured.out
    assert "'Qwen/Qwen1.5-1.8B-Chat' is no directory here and the hub" in captured.err
    assert "no route to huggingface.co" in captured.err
    missing = run_flags({**inputs, "model": "./none", "base": ""}, tmp_path / "run", **PLAIN)
    assert main(["dpo", *missing]) == 2
    assert "model.path: " in capsys.readouterr().err


def test_mixtures_and_prefix_sharing_as_asked(inputs, tmp_path, capsys):
    more = write_jsonl(tmp_path / "more.jsonl", make_records(20))
    file = tmp_path / "mix.yaml"
    file.write_text(f"data:\n  mix: {{{more}: 0.5}}\n")
    arguments = run_flags(
        {**inputs, "base": ""}, tmp_path / "run", **PLAIN, data__eval_fraction=None
    )
    off = flags({"data.prefix_sharing": "false"})
    assert main(["dpo", "--config", str(file), *arguments, *off]) == 0
    shown = capsys.readouterr().out
    assert "more.jsonl: 20 of 20 records" in shown
    assert "Tokens of 50 training rows" in shown
    assert "6 steps of 8 rows, 1.2 epochs" in shown  # of 30 + 10 rows
    assert "prompts computed for each answer" in shown
    sft = [one for one in arguments if one not in ("--optimizer.name", "adamw")]
    records = [{"prompt": one["prompt"], "completion": one["output"]} for one in make_records(20)]
    path = write_jsonl(tmp_path / "examples.jsonl", records)
    asked = flags({"data.path": path, "data.prefix_sharing": "true"})
    assert main(["sft", *sft, *asked]) == 2
    assert (
        "data.prefix_sharing is true, but these records have one answer" in capsys.readouterr().err
    )


def test_settings_are_checked_first(inputs, tmp_path, capsys):
    arguments = run_flags({**inputs, "base": ""}, tmp_path / "run", **PLAIN)
    assert main(["dpo", *arguments, *flags({"data.max_prompt_length": 250})]) == 2
    assert "the model has 256 positions" in capsys.readouterr().err
    assert main(["dpo", *arguments, *flags({"trainer.batch_size": 100})]) == 2
    assert "only" in capsys.readouterr().err


def test_what_the_run_would_refuse_later_is_refused(inputs, tmp_path, capsys):
    arguments = run_flags({**inputs, "base": ""}, tmp_path / "run", **PLAIN)
    merging = run_flags(
        {**inputs, "base": str(tmp_path / "none")}, tmp_path / "run", dry_run="true"
    )
    assert main(["dpo", *merging]) == 2
    assert "model.base: " in capsys.readouterr().err
    late = flags({"optimizer.name": "child_tuning", "optimizer.density": 0.5})
    late += flags({"schedule.type": "linear", "schedule.warmup_steps": 7})
    assert main(["dpo", *arguments, *late]) == 2
    assert "schedule.warmup_steps" in capsys.readouterr().err
    on_policy = PLAIN | {
        "data__max_completion_length": None,
        "reward__function": "no_such_module:f",
    }
    arguments = run_flags({**inputs, "base": ""}, tmp_path / "run", **on_policy)
    assert main(["grpo", *arguments]) == 2
    assert "no_such_module" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 64}, "mesh.data * mesh.fsdp * mesh.tensor must be at most"),
        (
            {"trainer.gradient_accumulation_steps": 3},
            "batch_size must be a multiple of 3 (3 trainer.gradient_accumulation_steps), got 8.",
        ),
        (
            {"model.freeze": "[no_layer]"},
            "model.freeze: 'no_layer' is found in no parameter.",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses_with_the_same_message(
    inputs, tmp_path, capsys, changes, message
):
    make_model_dir(tmp_path / "model")  # with its weights, for the run
    capsys.readouterr()
    arguments = run_flags({**inputs, "base": ""}, tmp_path / "run", **PLAIN)
    said = []
    for dry_run in ("true", "false"):
        command = ["dpo", *arguments, *flags({**changes, "dry_run": dry_run})]
        assert main(command) == 2
        said.append(capsys.readouterr().err)
    assert message in said[0]
    assert said[0] == said[1]
