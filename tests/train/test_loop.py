"""The loop: what is read when, what is logged, evaluated and saved at which step."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from train.config import EarlyStopOptions, TrainerOptions, UserError
from train.distributed.stop import Stopped
from train.files.metrics_log import read_metrics
from train.files.run_directory import OutputDir
from train.training.checkpoint import Checkpoints, abstract
from train.training.loop import Job, fit
from train.training.step import init_state, make_train_step
from train.training.step_log import count_tokens

STEPS = 7
TX = optax.adam(0.1)


class CountingLoader:
    """Batches that follow from their number alone."""

    def __init__(self) -> None:
        self.number = 0

    def __next__(self) -> dict[str, np.ndarray]:
        self.number += 1
        rng = np.random.default_rng(self.number)
        mask = np.ones((2, 3), bool)
        return {"x": rng.normal(size=3).astype(np.float32), "prompt_mask": mask, "a_mask": mask}

    def get_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def loss_fn(params, batch):
    loss = jnp.sum(jnp.square(params["w"] - batch["x"]))
    return loss, {"loss": loss}


def start():
    return init_state({"w": jnp.zeros(3)}, TX)


def make_job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "start": start,
        "like": abstract(jax.eval_shape(start)),
        "step": make_train_step(loss_fn, TX),
        "loader": CountingLoader(),
        "evaluate": lambda state: {"eval_loss": float(jnp.sum(state["params"]["w"]))},
        "check_first": None,
        "learning_rates": np.linspace(0.1, 0.7, STEPS),
        "mesh": None,
    }
    return Job(**(values | changes))


def run(path: Path, job: Job, **options: Any):
    path.mkdir(exist_ok=True)
    output = OutputDir(path, {}, started=False, summary=None)
    shown = io.StringIO()
    trainer = TrainerOptions(batch_size=2, **options)
    try:
        state, _ = fit(job, trainer, output, Console(file=shown, width=100))
    except UserError as error:
        error.add_note(shown.getvalue())
        raise
    return state, read_metrics(path / "metrics.jsonl"), shown.getvalue()


def by_hand() -> tuple[list[float], list[float]]:
    """Losses and sums of the weights after each step, with optax alone."""
    params: Any = {"w": jnp.zeros(3)}
    state, loader, losses, sums = TX.init(params), CountingLoader(), [], []
    for _ in range(STEPS):
        batch = next(loader)
        (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, state = TX.update(gradient, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
        sums.append(float(jnp.sum(params["w"])))
    return losses, sums


def test_every_step_is_logged_with_its_own_figures(tmp_path):
    _, rows, _ = run(tmp_path, make_job(evaluate=None))
    losses, _ = by_hand()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in rows], losses, rtol=1e-5)
    rates = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(rates, np.linspace(0.1, 0.7, STEPS))
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_evaluation_at_its_interval_and_at_the_end(tmp_path):
    _, rows, shown = run(tmp_path, make_job(), eval_every=3, log_every=100)
    _, sums = by_hand()
    evaluated = {int(row["step"]): row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(evaluated) == [3, 6, 7]
    for step, value in evaluated.items():
        assert value == pytest.approx(sums[step - 1], rel=1e-5)
        assert f"step {step}  eval loss" in shown
    # With sparse logging the first and the last step are still there.
    assert [row["step"] for row in rows if "loss" in row] == [1, 7]


def test_metrics_are_read_after_the_next_step_is_on_its_way(tmp_path):
    events: list[str] = []

    class Probe:
        def __init__(self, step: int) -> None:
            self.step = step

        def __array__(self, *args: Any, **options: Any) -> np.ndarray:
            events.append(f"read {self.step}")
            return np.float32(self.step) * np.ones(())

    def step(state, batch):
        number = int(state["step"]) + 1
        events.append(f"dispatch {number}")
        return {**state, "step": state["step"] + 1}, {"loss": Probe(number)}

    run(tmp_path, make_job(step=step, evaluate=None))
    expected = ["dispatch 1"]
    for number in range(2, STEPS + 1):
        expected += [f"dispatch {number}", f"read {number - 1}"]
    assert events == [*expected, f"read {STEPS}"]


def test_first_metrics_are_checked_once(tmp_path):
    seen = []
    run(tmp_path / "a", make_job(check_first=seen.append), save_every=2)
    assert len(seen) == 1
    assert seen[0]["loss"] == pytest.approx(by_hand()[0][0])

    def refuse(metrics):
        raise ValueError("not the reference")

    with pytest.raises(ValueError, match="not the reference"):
        run(tmp_path / "b", make_job(check_first=refuse))


class BadLoader(CountingLoader):
    """NaN in the batches of some numbers."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = bad

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        return {**batch, "x": batch["x"] * np.float32(np.nan if self.number in self.bad else 1)}


class LessLoader(CountingLoader):
    """Without the batches of some numbers."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = bad

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        return batch if self.number not in self.bad else next(self)


@pytest.mark.parametrize("bad", [(1,), (3,), (2, 3, 6)])
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, bad):
    checked = []
    job = make_job(loader=BadLoader(*bad), check_first=checked.append)
    state, rows, shown = run(tmp_path / "bad", job)
    fewer = np.linspace(0.1, 0.7, STEPS)[: STEPS - len(bad)]
    expected, _, _ = run(tmp_path / "less", make_job(loader=LessLoader(*bad), learning_rates=fewer))
    for name in ("params", "opt_state"):  # as if the batches had not been there
        jax.tree.map(np.testing.assert_array_equal, state[name], expected[name])
    assert int(state["step"]) == STEPS
    counts = [sum(number <= step for number in bad) for step in range(1, STEPS + 1)]
    assert [row["skipped_steps"] for row in rows if "loss" in row] == counts
    assert f"{len(bad)} steps skipped up to step {bad[-1]}: not finite (loss nan" in shown
    assert np.isfinite(checked[0]["loss"])  # the check of the start waits for a step that counts


@pytest.mark.parametrize(
    ("options", "seen", "found"),
    [
        ({"max_skipped_steps": 2}, 5, [2, 4]),
        ({"max_skipped_steps": 2, "log_every": 100}, 6, [2, 4]),  # at every second one
        ({"max_skipped_steps": 0}, 3, [2]),
        ({"max_skipped_steps": 3, "log_every": 100}, 6, [2, 4]),  # seen before it would be saved
    ],
)
def test_too_many_skipped_steps_end_the_run(tmp_path, options, seen, found):
    job = make_job(loader=BadLoader(*range(3, STEPS + 1)), evaluate=None)
    message = rf"up to step {seen} were not finite \(loss nan.*optimizer\.learning_rate"
    with pytest.raises(UserError, match=message):
        run(tmp_path, job, save_every=2, keep=3, **options)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as saved:
        assert saved.steps() == found
        good, _ = saved.restore(found[0], job.like)
    expected, _, _ = run(tmp_path / "two", make_job(learning_rates=np.linspace(0.1, 0.2, 2)))
    np.testing.assert_array_equal(good["params"]["w"], expected["params"]["w"])


def test_resume_goes_on_from_the_last_checkpoint(tmp_path):
    class Killed(Exception):
        pass

    train_step = make_train_step(loss_fn, TX)

    def dying_step(state, batch):
        if int(state["step"]) == 5:
            raise Killed
        return train_step(state, batch)

    whole, expected, _ = run(tmp_path / "whole", make_job(), eval_every=2)
    with pytest.raises(Killed):
        run(tmp_path / "killed", make_job(step=dying_step), eval_every=2, save_every=2)
    checked = []
    job = make_job(start=None, check_first=checked.append)
    state, rows, shown = run(tmp_path / "killed", job, eval_every=2, save_every=2)
    assert "Resuming after step 4 of 7." in shown
    assert not checked  # the policy has moved, so the check for a fresh start does not apply
    assert (np.asarray(state["params"]["w"]) == np.asarray(whole["params"]["w"])).all()
    drop = "tokens_per_second"
    assert [{n: v for n, v in row.items() if n != drop} for row in rows] == [
        {n: v for n, v in row.items() if n != drop} for row in expected
    ]


def test_signal_saves_at_the_end_of_the_step_and_the_run_goes_on(tmp_path):
    train_step = make_train_step(loss_fn, TX)

    def signalled_step(state, batch):
        if int(state["step"]) == 3:  # in step 4
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state, batch)

    whole, expected, _ = run(tmp_path / "whole", make_job(), eval_every=2)
    with pytest.raises(Stopped, match=r"saved after step 4 of 7; the same command goes on"):
        run(tmp_path / "stopped", make_job(step=signalled_step), eval_every=2)
    with Checkpoints(tmp_path / "stopped" / "checkpoints", read_only=True) as saved:
        assert saved.steps() == [4]
    state, rows, shown = run(tmp_path / "stopped", make_job(start=None), eval_every=2)
    assert "Resuming after step 4 of 7." in shown
    np.testing.assert_array_equal(state["params"]["w"], whole["params"]["w"])
    # The evaluation of step 4, for which there was no time, is made up for.
    rates = ("tokens_per_second",)
    assert [{n: v for n, v in row.items() if n not in rates} for row in rows] == [
        {n: v for n, v in row.items() if n not in rates} for row in expected
    ]


def make_evaluate(values: list[float]):
    """Held-out losses that come one after the other, the first before training."""
    following = iter(values)
    return lambda state: {"eval_loss": next(following)}


def test_early_stop_keeps_the_best_checkpoint(tmp_path):
    options = {
        "eval_every": 1,
        "keep": 1,
        "early_stop": EarlyStopOptions(metric="eval_loss", patience=2),
        "export_best": "eval_loss",
    }
    evaluate = make_evaluate([9, 5, 3, 4, 6])
    state, rows, shown = run(tmp_path, make_job(evaluate=evaluate), **options)
    assert int(state["step"]) == 4
    assert "Stopped early: eval_loss has not improved in the last 2 evaluations" in shown
    assert [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row] == [
        (0, 9),
        (1, 5),
        (2, 3),
        (3, 4),
        (4, 6),
    ]
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as saved:
        assert saved.steps() == [2, 4]  # the best, and the last
    # Started again, for example after a kill during the export, it stays where it stopped.
    again, _, _ = run(tmp_path, make_job(start=None, evaluate=None), **options)
    assert int(again["step"]) == 4


def test_full_disk_under_the_log_stops_with_a_message(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    os.symlink("/dev/full", path)
    monkeypatch.setattr("train.files.metrics_log.keep_until", lambda path, step: None)
    monkeypatch.setattr("train.training.loop.read_metrics", lambda path: [])
    with pytest.raises(UserError, match=r"the log in .* cannot be written \(No space left"):
        run(tmp_path, make_job())


def test_run_whose_last_checkpoint_fails_is_not_finished(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(28, "No space left on device")

    run(tmp_path, make_job(learning_rates=np.linspace(0.1, 0.3, 3)))
    with monkeypatch.context() as broken:
        broken.setattr("train.training.checkpoint.write_manifest", refuse)
        message = r"step 7 is not saved, so nothing is exported\. .* goes on from step 3"
        with pytest.raises(UserError, match=message):
            run(tmp_path, make_job(start=None))
    state, rows, _ = run(tmp_path, make_job(start=None))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert int(state["step"]) == STEPS


def test_last_state_is_saved_whatever_the_interval(tmp_path):
    run(tmp_path, make_job(), save_every=4)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as saved:
        assert saved.steps() == [4, STEPS]
        _, position = saved.restore(STEPS, make_job().like)
    assert position == {"number": STEPS}


def test_tokens_of_a_batch():
    mask = np.array([[True, True, False], [True, False, False]])
    assert count_tokens({"prompt_mask": mask, "completion_mask": ~mask}) == 3 + 3
    pair = {"prompt_mask": mask, "chosen_mask": ~mask, "rejected_mask": mask}
    assert count_tokens(pair) == 2 * 3 + 3 + 3
    packed = {"packed_parts": np.array([[0, 0, 1], [0, -1, -1]])}
    for count in (count_tokens, jax.jit(count_tokens)):  # several processes count on the devices
        assert count(packed) == 4
