"""Every loss by name on the command line; KTO and reference-free runs from start to export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.train.tiny_runs import (
    flags,
    make_records,
    make_tokenizer,
    read_tensors,
    run_flags,
    write_inputs,
    write_jsonl,
)
from train.cli import main
from train.commands.dpo import train_dpo
from train.commands.kto import arrange, train_kto
from train.config import DPOConfig, KTOConfig, UserError
from train.config.command_line import configured
from train.data import tokenize_unpaired
from train.data.mismatched import in_random_order, rotation, with_kl_completions
from train.files.metrics_log import read_metrics
from train.losses import LOSSES, UNPAIRED_LOSSES, PreferenceLoss
from train.losses.options import loss_from
from train.runs.reference import cache_file

REQUIRED = flags(
    {
        "output_dir": "out",
        "model.path": "sft",
        "data.path": "pairs.jsonl",
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 1e-6,
        "trainer.batch_size": 4,
        "trainer.steps": 2,
    }
)
SHORT = {
    "optimizer__name": "adamw",
    "optimizer__alpha": None,
    "optimizer__density": None,
    "model__base": None,
    "trainer__steps": 4,
}


def dpo_config(*more: str) -> DPOConfig:
    return configured("dpo", DPOConfig, [*REQUIRED, *more])


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_on_pairs_is_reached_by_its_name(name):
    smoothing = ["--loss.label_smoothing", "0.001"] if name == "exo_pair" else []
    loss = loss_from(PreferenceLoss, dpo_config("--loss.type", name, *smoothing).loss)
    assert loss.types == (name,)


def test_mixes_are_lists():
    more = [
        "--loss.type",
        "[sigmoid, sft]",
        "--loss.weights",
        "[1.0, 0.1]",
        "--loss.ld_alpha",
        "null",
    ]
    loss = loss_from(PreferenceLoss, dpo_config(*more).loss)
    assert loss.terms == [("sigmoid", 1.0), ("sft", 0.1)]


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_every_loss_on_labelled_answers_is_reached_by_its_name(name):
    assert configured("kto", KTOConfig, [*REQUIRED, "--loss.type", name]).loss.type == name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss.type", "kto"], "loss: Unknown loss_type 'kto'"),
        (["--loss.type", "exo_pair"], "loss: label_smoothing must be positive"),
        (["--loss.weights", "[1.0, 2.0]"], "loss: weights must hold one number for each"),
        (["--loss.beta_schedule", "linear"], "loss: beta_final must be positive"),
        (["--loss.beta_final", "0.2"], "loss: beta_final is 0.2, but a constant beta"),
    ],
)
def test_losses_that_cannot_be_are_named_before_a_file_is_read(more, message):
    with pytest.raises(UserError, match=message):
        train_dpo(dpo_config(*more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trainer.batch_size", "1"], "trainer.batch_size must be at least 2 for loss.type kto"),
        (["--loss.beta", "0"], "loss: beta must be positive"),
        (["--loss.desirable_weight", "-1"], "loss: desirable_weight must be 0 or larger"),
    ],
)
def test_kto_settings_that_cannot_be_are_named(more, message):
    with pytest.raises(UserError, match=message):
        train_kto(configured("kto", KTOConfig, [*REQUIRED, *more]))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("inputs")
    answers = [
        {"prompt": r["prompt"], "completion": r[which], "label": which == "chosen"}
        for r in make_records()
        for which in ("chosen", "rejected")
    ]
    file = write_jsonl(directory / "answers.jsonl", answers)
    return {**write_inputs(directory), "answers": str(file)}


def kto_flags(inputs: dict[str, str], output: Path, **changes) -> list[str]:
    return run_flags(inputs, output, **{"data__path": inputs["answers"], **changes})


@pytest.fixture(scope="module")
def kto(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("kto") / "run"
    assert main(["kto", *kto_flags(inputs, output, **SHORT, trainer__eval_every=2)]) == 0
    return output


def test_kto_starts_at_the_reference_and_separates_the_labels(kto):
    rows = read_metrics(kto / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert rows[0].keys() >= {"rewards/chosen", "rewards/rejected", "logps/chosen", "grad_norm"}
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [2, 4]
    assert evaluated[-1].keys() >= {
        "eval_kl",
        "eval_rewards/chosen",
        "eval_rewards/rejected",
        "eval_rewards/margins",
        "eval_logps/chosen",
        "eval_logps/rejected",
    }
    assert evaluated[-1]["eval_rewards/margins"] > 0
    assert (kto / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_kto_resumes_bit_by_bit_with_another_eval_batch(kto, inputs, tmp_path, monkeypatch):
    output = tmp_path / "run"
    arguments = kto_flags(inputs, output, **SHORT, trainer__save_every=1, trainer__eval_every=2)
    from train.training.step_log import StepLog

    evaluated = StepLog.evaluated

    def stop(self, step, metrics):
        if step == 2:
            raise KeyboardInterrupt
        evaluated(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "evaluated", stop)
        assert main(["kto", *arguments]) == 130
    assert main(["kto", *arguments, "--trainer.eval_batch_size", "5"]) == 0
    ours, whole = read_tensors(output / "export"), read_tensors(kto / "export")
    assert ours.keys() == whole.keys()
    assert all((ours[name] == whole[name]).all() for name in whole)


def test_rows_that_fill_no_batch_and_unequal_labels_are_told(capsys):
    records = [
        {"prompt": r["prompt"], "completion": r["chosen"], "label": n < 5}
        for n, r in enumerate(make_records(20))
    ]
    data = tokenize_unpaired(
        records, make_tokenizer(), max_prompt_length=64, max_completion_length=16
    )
    config = configured("kto", KTOConfig, [*REQUIRED, "--trainer.batch_size", "6"])
    arranged, held_out = arrange(config, data, data, Console(width=500))
    output = capsys.readouterr().out
    assert "2 of 20 rows do not fill a batch of 6" in output
    assert "desirable_weight from 3 to 4, or undesirable_weight from 0.25 to 0.333" in output
    for found, batch_size in ((arranged, 6), (held_out, 20)):
        assert found is not None
        source = rotation(20, batch_size)
        tokens = found.arrays["completion_tokens"][source]
        np.testing.assert_array_equal(found.arrays["kl_tokens"], tokens)
    # Other batches pair other completions, and their reference is computed anew.
    other = with_kl_completions(in_random_order(data, 0), 4)
    assert cache_file(Path(), "hash", other, []) != cache_file(Path(), "hash", arranged, [])


@pytest.mark.slow
def test_reference_free_runs_keep_no_reference(inputs, tmp_path):
    output = tmp_path / "run"
    assert main(["dpo", *run_flags(inputs, output, **SHORT, loss__type="simpo")]) == 0
    assert not (output / "reference").exists()
    rows = read_metrics(output / "metrics.jsonl")
    assert rows[0]["nll_loss"] == pytest.approx(-rows[0]["logps/chosen"], rel=0.2)
    assert "eval_rewards/margins" in json.loads((output / "summary.json").read_text())["metrics"]
