"""Whole runs of the commands: SFT, then alignment, then evaluation, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.tiny_runs import flags, make_records, read_tensors, run_flags, write_inputs
from tests.virtual_devices import run_python
from train.cli import main
from train.data import read_records, split_by_prompt
from train.files.metrics_log import read_metrics

NO_MERGE = {"optimizer__alpha": None, "optimizer__density": None, "model__base": None}
SFT = {
    "optimizer__name": None,
    "trainer__steps": 12,
    "trainer__eval_every": 6,
    "optimizer__learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def sft(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("sft") / "run"
    arguments = run_flags(
        inputs, output, **SFT, **NO_MERGE, model__path=inputs["base"], data__path=inputs["examples"]
    )
    assert main(["sft", *arguments]) == 0
    return output


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def dpo_flags(inputs, sft: Path, output: Path, **changes) -> list[str]:
    changes = {"model__path": sft / "export", "trainer__eval_every": 3, **changes}
    return run_flags(inputs, output, **changes)


@pytest.fixture(scope="module")
def dpo(inputs, sft, cache, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("dpo") / "run"
    arguments = dpo_flags(
        inputs,
        sft,
        output,
        optimizer__name="on_ties_adamw",
        optimizer__diagnostics="true",
        optimizer__delta_dtype="bfloat16",
        reference_cache=cache,
    )
    assert main(["dpo", *arguments]) == 0
    return output


def held_out_loss(directory: Path, data: str) -> float:
    """Mean cross-entropy of the held-out answers' tokens by transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    logps = []
    for record in split_by_prompt(read_records(data), 0.2, 0)[1]:
        text = tokenizer.apply_chat_template(
            record["prompt"], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text)["input_ids"]
        answer = tokenizer(record["completion"] + "<|im_end|>")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    return -float(torch.cat(logps).mean())


def test_sft_lowers_the_loss_and_exports_what_it_measured(sft, inputs):
    rows = read_metrics(sft / "metrics.jsonl")
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(evaluated) == 2
    assert evaluated[-1] < held_out_loss(Path(inputs["base"]), inputs["examples"])
    # The exported model, loaded by transformers, has the loss that the log says.
    assert held_out_loss(sft / "export", inputs["examples"]) == pytest.approx(
        evaluated[-1], rel=1e-5
    )
    assert rows[0].keys() >= {"loss", "grad_norm", "mean_token_accuracy", "num_tokens"}
    summary = json.loads((sft / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["metrics"]["eval_loss"] == {"first": evaluated[0], "last": evaluated[1]}


def test_alignment_starts_at_the_reference(dpo):
    rows = read_metrics(dpo / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert rows[0]["merge/alpha_total"] == pytest.approx(1e-3)
    totals = [row["merge/alpha_total"] for row in rows if "merge/alpha_total" in row]
    assert totals == pytest.approx([1e-3 * step for step in range(1, 7)])
    assert rows[0]["merge/kept_share"] == pytest.approx(0.5, abs=0.01)
    assert [row["step"] for row in rows if "eval_rewards/margins" in row] == [3, 6]


def test_reference_is_computed_once_for_runs_that_share_it(
    inputs, sft, dpo, cache, capsys, tmp_path
):
    files = sorted(cache.iterdir())
    assert len(files) == 2  # training and held-out pairs
    arguments = dpo_flags(
        inputs, sft, tmp_path / "run", **NO_MERGE, optimizer__name="adamw", reference_cache=cache
    )
    capsys.readouterr()
    assert main(["dpo", *arguments]) == 0
    assert "reference log-probabilities" not in capsys.readouterr().out
    assert sorted(cache.iterdir()) == files
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert not any(name.startswith("merge/") for row in rows for name in row)


def test_wrong_reference_is_noticed(inputs, sft, dpo, cache, tmp_path, capsys):
    mine = tmp_path / "cache"
    mine.mkdir()
    for file in cache.iterdir():
        stored = np.load(file)
        np.savez(mine / file.name, chosen=stored["chosen"] + 5, rejected=stored["rejected"])
    arguments = dpo_flags(inputs, sft, tmp_path / "run", reference_cache=mine)
    assert main(["dpo", *arguments]) == 2
    assert "The policy does not start at the reference model" in capsys.readouterr().err


def test_eval_repeats_what_the_run_measured(inputs, sft, dpo, tmp_path, capsys):
    output = tmp_path / "results" / "dpo.json"
    settings = tmp_path / "eval.yaml"
    settings.write_text(
        "tasks: {sums: {path: none, prompt: '{prompt[0][content]}', answer: '{number:g}'}}\n"
    )
    arguments = flags(
        {
            "config": settings,
            "model": dpo / "export",
            "output": output,
            "preferences.reference": sft / "export",
            "preferences.path": inputs["pairs"],
            "preferences.eval_fraction": 0.2,
            "preferences.max_prompt_length": 64,
            "preferences.max_completion_length": 16,
            "tasks.sums.path": inputs["pairs"],
            "tasks.sums.limit": 10,
            "batch_size": 4,
        }
    )
    assert main(["eval", *arguments]) == 0
    results = json.loads(output.read_text())
    logged = [row for row in read_metrics(dpo / "metrics.jsonl") if "eval_loss" in row][-1]
    for name, value in results["preferences"].items():
        if name != "pairs":
            assert value == pytest.approx(logged[f"eval_{name}"], rel=1e-3, abs=1e-5)
    assert results["tasks"]["sums"]["questions"] == 10
    shown = capsys.readouterr().out
    assert "accuracy_per_token" in shown
    assert main(["eval", *arguments]) == 2
    assert "exists; nothing is overwritten" in capsys.readouterr().err


def eval_flags(inputs, model: Path, output: Path) -> list[str]:
    return flags(
        {
            "model": model,
            "output": output,
            "preferences.reference": model,
            "preferences.path": inputs["pairs"],
            "preferences.max_prompt_length": 64,
            "preferences.max_completion_length": 16,
        }
    )


def test_eval_shows_results_that_cannot_be_written(inputs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results.json"

    def evaluate(*args):
        output.write_text("mine")  # by another process in the meantime
        return {
            "model": "m",
            "preferences": {"margin": 0.25},
            "tasks": {},
            "texts": {},
            "generation": {},
        }

    monkeypatch.setattr("train.commands.evaluate._evaluate", evaluate)
    assert main(["eval", *eval_flags(inputs, Path(inputs["model"]), output)]) == 2
    shown = capsys.readouterr()
    assert "0.2500" in shown.out
    assert "exists; nothing is overwritten" in shown.err
    assert output.read_text() == "mine"


def test_eval_looks_at_its_output_before_any_work(inputs, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / "results.json"
    assert main(["eval", *eval_flags(inputs, Path(inputs["model"]), output)]) == 2
    shown = capsys.readouterr()
    assert "preferences:" not in shown.out
    assert "error: output " in shown.err
    assert "Not a directory" in shown.err


def test_eval_computes_in_its_type_with_whole_parameters(inputs, tmp_path, monkeypatch):
    held = []

    def evaluate_preferences(*args, **rest):
        def evaluate(params):
            held.extend(leaf.dtype.name for leaf in jax.tree.leaves(params))
            return {"eval_margin": 0.0}

        return evaluate

    monkeypatch.setattr("train.commands.evaluate.evaluate_preferences", evaluate_preferences)
    monkeypatch.setattr(
        "train.commands.evaluate._with_reference", lambda config, score, pairs: pairs
    )
    arguments = eval_flags(inputs, Path(inputs["model"]), tmp_path / "results.json")
    assert main(["eval", *arguments, "--dtype", "bfloat16"]) == 0
    assert set(held) == {"float32"}


def test_eval_wants_something_to_do(sft, tmp_path, capsys):
    arguments = flags({"model": sft / "export", "output": tmp_path / "x.json"})
    assert main(["eval", *arguments]) == 2
    assert "give preferences, tasks, texts or generation" in capsys.readouterr().err


@pytest.mark.slow
def test_four_devices_train_like_one(inputs, tmp_path):
    exports = {}
    for count in (1, 4):
        output = tmp_path / str(count)
        run_python("-m", "train", "dpo", *run_flags(inputs, output), devices=count)
        exports[count] = read_tensors(output / "export")
    start = read_tensors(Path(inputs["model"]))
    for name, tensor in exports[1].items():
        moved = np.abs(tensor - start[name]).max()
        assert np.abs(tensor - exports[4][name]).max() <= max(1e-6, 0.02 * moved), name


def test_records_of_the_fixture_are_split():
    train, held_out = split_by_prompt(make_records(), 0.2, 0)
    assert len(train) >= 24
    assert len(held_out) >= 3
