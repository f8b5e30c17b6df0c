"""Tasks that are scored during training: the floors that stop a run, and what is exported then."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.train.tiny_runs import flags, make_tokenizer, read_tensors, write_inputs, write_jsonl
from train.cli import main
from train.files.metrics_log import read_metrics

TEXT = "Nothing of this is a sum: the quick brown fox jumps over the lazy dog. "
PERPLEXITY = "eval_texts/prose/perplexity"
SKILL = "eval_tasks/sums/accuracy"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    made = write_inputs(directory)
    return made | {"prose": str(write_jsonl(directory / "prose.jsonl", [{"text": TEXT}]))}


def sft(inputs, output, **changes) -> list[str]:
    values = {
        "model.path": inputs["model"],
        "data.path": inputs["examples"],
        "data.max_prompt_length": 64,
        "data.max_completion_length": 16,
        "optimizer.learning_rate": 3e-3,
        "schedule.type": "constant",
        "trainer.batch_size": 8,
        "trainer.steps": 6,
        "trainer.eval_every": 2,
        "trainer.keep": 1,
        "evaluation.texts.prose.path": inputs["prose"],
        "output_dir": output,
    }
    return flags(values | {name.replace("__", "."): value for name, value in changes.items()})


def further_tasks(inputs) -> dict[str, str | int]:
    return {
        "evaluation.tasks.sums.path": inputs["pairs"],
        "evaluation.tasks.sums.prompt": "{number}",
        "evaluation.tasks.sums.answer": "{output}",
        "evaluation.generation.total.path": inputs["pairs"],
        "evaluation.generation.total.prompt": "{number}",
        "evaluation.generation.total.answer": "{output}",
        "evaluation.generation.total.max_new_tokens": 4,
        "evaluation.generation.total.limit": 4,
    }


def scores(run) -> dict[int, dict[str, float]]:
    rows = read_metrics(run / "metrics.jsonl")
    return {int(row["step"]): row for row in rows if PERPLEXITY in row}


def test_scores_are_those_of_transformers_and_of_the_eval_command(inputs, tmp_path):
    run, more = tmp_path / "run", further_tasks(inputs)
    short = {"trainer__eval_every": None, "trainer__steps": 2}
    assert main(["sft", *sft(inputs, run, **short, **more)]) == 0
    (logged,) = scores(run).values()
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    ids = torch.tensor([make_tokenizer()(TEXT)["input_ids"]])
    with torch.no_grad():
        nll = float(model(ids, labels=ids).loss)
    assert logged[PERPLEXITY] == pytest.approx(math.exp(nll), rel=1e-4)
    tasks = more | {"evaluation.texts.prose.path": inputs["prose"]}
    again = flags({name.removeprefix("evaluation."): value for name, value in tasks.items()})
    output = tmp_path / "eval.json"
    assert main(["eval", "--model", str(run / "export"), "--output", str(output), *again]) == 0
    found = json.loads(output.read_text())
    for kind, name in (("tasks", "sums"), ("texts", "prose"), ("generation", "total")):
        for metric, value in found[kind][name].items():
            key = f"eval_{kind}/{name}/{metric}"
            assert (key in logged) == (metric not in ("questions", "tokens", "problems"))
            assert logged.get(key, value) == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_floor_ends_the_run_and_the_last_step_within_it_is_exported(inputs, tmp_path, capsys):
    """Learning sums makes prose less likely, and the run goes no further than is allowed."""
    free = tmp_path / "free"
    assert main(["sft", *sft(inputs, free, trainer__export_best=PERPLEXITY)]) == 0
    course = {step: row[PERPLEXITY] for step, row in scores(free).items()}
    assert course[0] < course[2] < course[4] < course[6]
    run, drop = tmp_path / "run", (course[2] + course[4]) / 2 - course[0]
    stop = {"trainer__early_stop__max_drop": json.dumps({PERPLEXITY: drop})}
    command = ["sft", *sft(inputs, run, **stop)]
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"Stopped early: at step 4 {PERPLEXITY} is {course[4]:.4g}, and" in shown
    assert "Last evaluation within the floors: step 2." in shown
    assert list(scores(run)) == [0, 2, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["exported_step"]) == (4, 2)
    two = tmp_path / "two"
    assert main(["export", "--run", str(run), "--output", str(two), "--step", "2"]) == 0
    exported, expected = read_tensors(run / "export"), read_tensors(two)
    assert all(np.array_equal(exported[name], expected[name]) for name in expected)
    # Killed before it was exported, the run stays where it stopped.
    (run / "summary.json").unlink()
    shutil.rmtree(run / "export")
    assert main(command) == 0
    assert list(scores(run)) == [0, 2, 4]
    assert json.loads((run / "summary.json").read_text())["exported_step"] == 2


@pytest.mark.slow
def test_nothing_within_the_floors_is_not_exported(inputs, tmp_path, capsys):
    stop = {"trainer__early_stop__max_drop": json.dumps({PERPLEXITY: 0.0})}
    assert main(["sft", *sft(inputs, tmp_path / "run", **stop)]) == 2
    message = capsys.readouterr().err
    assert f"at step 2 {PERPLEXITY} is" in message
    assert "nothing is exported" in message
    assert not (tmp_path / "run" / "export").exists()
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer__early_stop__floors": json.dumps({"eval_tasks/sum/accuracy": 0.5})},
            "trainer.early_stop names 'eval_tasks/sum/accuracy', but there is no such task under "
            "evaluation; there are eval_tasks/sums/…",
        ),
        (
            {"trainer__early_stop__max_drop": json.dumps({SKILL: -0.1})},
            "trainer.early_stop.max_drop['eval_tasks/sums/accuracy'] must be 0 or larger",
        ),
        (
            {
                "trainer__early_stop__floors": json.dumps({SKILL: 0.5}),
                "trainer__early_stop__max_drop": json.dumps({SKILL: 0.1}),
            },
            "both in floors and in max_drop",
        ),
        ({"evaluation__tasks__sums__prompt": "{nothing}"}, "evaluation.tasks.sums.prompt: "),
        ({"trainer__export_best": "eval_texts/news/nll"}, "trainer.export_best names"),
    ],
)
def test_settings_that_cannot_work_are_refused(inputs, tmp_path, capsys, changes, message):
    given = further_tasks(inputs) | changes
    assert main(["sft", *sft(inputs, tmp_path / "run", **given)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dry_run_reads_the_tasks(inputs, tmp_path, capsys):
    assert (
        main(["sft", *sft(inputs, tmp_path / "run", dry_run="true", **further_tasks(inputs))]) == 0
    )
    assert "sums: 40 questions" in capsys.readouterr().out
