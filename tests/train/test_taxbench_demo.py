"""The demo from end to end, with a handful of steps."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import omerge_jax as om
from train.config import UserError, check_settings
from train.config.command_line import configured
from train.taxbench.miniature import demo, examples
from train.taxbench.miniature.demo import new_run_dir, run_demo
from train.taxbench.miniature.methods import METHODS, add_delta, offline_linear
from train.taxbench.miniature.report import command_line
from train.taxbench.miniature.sizes import DemoConfig
from train.taxbench.miniature.subjects import Subject
from train.taxbench.miniature.training import Lab

TINY = {"base_steps": 3, "sft_steps": 3, "steps": 4, "eval_every": 2, "pairs": 64, "questions": 2}


# Most of a tiny run is compilation, a few seconds for each method.
SOME_METHODS = tuple(method for method in METHODS if method.name in ("adamw", "on_ties"))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "METHODS", SOME_METHODS)
        yield run_demo(DemoConfig(output_dir=str(tmp_path_factory.mktemp("demo")), **TINY))


def test_demo_writes_every_method_at_every_evaluation(tiny_run):
    lines = (tiny_run / "results.jsonl").read_text().splitlines()
    points: dict[str, list[dict]] = {}
    for line in lines:
        point = json.loads(line)
        points.setdefault(point["method"], []).append(point)
    assert list(points) == [*(m.name for m in SOME_METHODS), "offline_linear", "adamw_plus_delta"]
    for method in SOME_METHODS:
        found = points[method.name]
        assert [point["step"] for point in found] == [0, 2, 4]
        assert found[0] == found[0] | {"reward": points["adamw"][0]["reward"]}
        assert all(0 <= point["capability"] <= 1 for point in found)
        total = found[-1]["metrics"].get("merge/alpha_total", 0.0)
        alpha = method.optimizer.alpha or 0.0
        assert isinstance(alpha, float)
        assert total == pytest.approx(4 * alpha)
    # A merge of weight 1 is the model itself.
    ends = (points["offline_linear"][-1], points["adamw"][-1])
    assert ends[0]["weight"] == 1
    assert ends[0]["reward"] == ends[1]["reward"]
    assert ends[0]["family_capability"] == ends[1]["family_capability"]
    assert json.loads((tiny_run / "settings.json").read_text())["steps"] == 4


def test_demo_reports_every_method(tiny_run):
    page = (tiny_run / "report.html").read_text(encoding="utf-8")
    for label in (*(m.label for m in SOME_METHODS), "Offline linear", "AdamW + λτ", "SFT model"):
        assert label in page
    assert "--steps 4" in page
    assert (tiny_run / "trajectories.png").stat().st_size > 10_000


def test_earlier_runs_are_kept(tmp_path):
    first = new_run_dir(str(tmp_path / "out"))
    (first / "report.html").write_text("mine")
    second = new_run_dir(str(tmp_path / "out"))
    assert (first.name, second.name) == ("run-001", "run-002")
    assert (first / "report.html").read_text() == "mine"
    assert list(second.iterdir()) == []


def test_controls_are_what_their_names_say():
    lab = Lab()
    base, sft, trained = (lab.fresh_params(seed) for seed in range(3))
    questions = examples.questions(np.random.default_rng(0), 1)
    scored = []

    class Recorder(Lab):
        def answers(self, params, questions):
            scored.append(params)
            return np.zeros((len(questions.families), 8), np.int32)

    recorder = Recorder()
    start = recorder.grade(sft, questions, at=0)
    subject = Subject(base, sft, {}, questions, start, seed=0)
    scored.clear()
    add_delta(recorder, subject, {0: sft, 5: trained}, 0.3, lambda units: None)
    delta = om.task_vector(sft, base)
    for model, origin in zip(scored, (sft, trained), strict=True):
        expected = jax.tree.map(lambda p, d: p + 0.3 * d, origin, delta)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), model, expected
        )
    scored.clear()
    path = offline_linear(recorder, subject, {0: sft, 5: trained}, lambda units: None)
    quarter = [point.at for point in path.points].index(0.25) - 1  # points start at the SFT model
    expected = jax.tree.map(lambda s, t: 0.75 * s + 0.25 * t, sft, trained)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        scored[quarter],
        expected,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 25, "eval_every": 10}, "eval_every must divide steps"),
        ({"reward": 1.5}, "reward must be between 0 and 1, got 1.5"),
        ({"pairs": 10}, "pairs must be 64 or larger, got 10"),
        ({"base_steps": 0}, "base_steps must be 2 or larger, got 0"),
        ({"questions": 0}, "questions must be positive"),
        ({"seed": -1}, "seed must be 0 or larger"),
        ({"control_weight": 0.0}, "control_weight must be positive"),
    ],
)
def test_bad_settings_stop_before_anything_is_written(settings, message, tmp_path):
    config = DemoConfig(output_dir=str(tmp_path / "out"), **settings)
    with pytest.raises(UserError, match=message):
        run_demo(config)
    assert not (tmp_path / "out").exists()


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        new_run_dir(str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_command_line_repeats_the_settings():
    check_settings(DemoConfig())
    assert command_line("demo", DemoConfig()) == "python -m train demo"
    config = DemoConfig(output_dir="my results", seed=3)
    assert command_line("demo", config) == "python -m train demo --output_dir 'my results' --seed 3"


def test_settings_file_lists_the_defaults():
    file = Path(__file__).parents[2] / "train/configs/taxbench-demo.yaml"
    assert configured("demo", DemoConfig, ["--config", str(file)]) == DemoConfig()
    fields = {line.split(":")[0] for line in file.read_text().splitlines() if line[0] != "#"}
    assert fields == {field.name for field in dataclasses.fields(DemoConfig)}
