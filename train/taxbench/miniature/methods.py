"""The methods that the benchmark compares, and how each makes its trajectory.

Settings are those that `python -m train taxbench --suite paper` chose on two other seeds, with bases of
their own, among four for each method, by mean capability where the reward first reaches 0.8
(docs/taxbench.md).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

import omerge_jax as om
from train.config import OptimizerOptions
from train.losses import PreferenceLoss, check_starts_at_reference
from train.taxbench.miniature.subjects import Subject
from train.taxbench.miniature.training import Lab, Params, Tick
from train.taxbench.miniature.trajectories import Trajectory, grade

WARMUP_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to align the fine-tuned model.

    Attributes:
        name: identifier.
        label: name in tables and plots; "(p = 1)" where the density is 1 and nothing is dropped.
        optimizer: its optimizer, as for `python -m train dpo`.
        beta: strength of DPO's pull towards the reference.
    """

    name: str
    label: str
    optimizer: OptimizerOptions
    beta: float = 0.1

    def settings(self, steps: int) -> str:
        """Its settings in words, with the total weight of the reference delta over `steps`."""
        options = self.optimizer
        text = f"lr {options.learning_rate:g}, β {self.beta:g}"
        if isinstance(options.alpha, float) and options.alpha:
            text += f", α {options.alpha:g}, p {options.density:g}, α·T {options.alpha * steps:.2g}"
        return text


METHODS = (
    Method("adamw", "AdamW", OptimizerOptions(learning_rate=3e-5)),
    Method("kl", "KL, β 0.3", OptimizerOptions(learning_rate=3e-5), beta=0.3),
    Method(
        "on_dare",
        "OnDARE (p = 1)",
        OptimizerOptions(name="on_dare", learning_rate=3e-5, alpha=1e-3, density=1.0),
    ),
    Method(
        "on_ties",
        "OnTIES (p = 0.1)",
        OptimizerOptions(name="on_ties", learning_rate=3e-5, alpha=1e-3, density=0.1),
    ),
)
OFFLINE_WEIGHTS = tuple(np.linspace(0.05, 1.0, 20).round(2).tolist())


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters (on the host) after an alignment step."""

    step: int
    params: Params


def align(
    lab: Lab,
    subject: Subject,
    method: Method,
    *,
    steps: int,
    batch_size: int,
    eval_every: int,
    tick: Tick,
) -> tuple[Trajectory, list[Checkpoint]]:
    """Runs one method and scores it along the way.

    Returns:
        Its trajectory and the parameters at every evaluation.
    """
    trainer = lab.aligner(
        method.optimizer,
        beta=method.beta,
        warmup_steps=min(WARMUP_STEPS, steps - 1),
        steps=steps,
        batch_size=batch_size,
    )
    points, checkpoints = [subject.start], []

    def visit(step: int, params: Params, metrics: dict[str, float]) -> None:
        answers = lab.answers(params, subject.questions)
        points.append(grade(answers, subject.questions, step, metrics=metrics))
        checkpoints.append(Checkpoint(step, jax.tree.map(np.asarray, params)))

    merges = method.optimizer.name != "adamw"
    trainer.run(
        subject.sft,
        subject.pairs,
        np.random.default_rng([subject.seed, 3]),
        delta=om.task_vector(subject.sft, subject.base) if merges else None,
        visit=visit,
        visit_every=eval_every,
        check_start=partial(check_starts_at_reference, loss=PreferenceLoss(beta=method.beta)),
        tick=tick,
    )
    trajectory = Trajectory(method.name, method.label, method.settings(steps), "step", points)
    return trajectory, checkpoints


def offline_linear(
    lab: Lab, subject: Subject, trained: Checkpoint, tick: Callable[[int], None]
) -> Trajectory:
    """AdamW's last model averaged with the fine-tuned one, over a grid of weights."""
    points = [subject.start]
    for weight in OFFLINE_WEIGHTS:
        merged = om.offline_merge(
            subject.base,
            [subject.sft, trained.params],
            method="linear",
            weights=[1 - weight, weight],
        )
        points.append(grade(lab.answers(merged, subject.questions), subject.questions, weight))
        tick(1)
    settings = f"(1 − w)·SFT + w·AdamW after {trained.step} steps, w = 0.05 … 1"
    return Trajectory("offline_linear", "Offline linear", settings, "weight", points)


def add_delta(
    lab: Lab, subject: Subject, trained: Sequence[Checkpoint], weight: float, tick: Tick
) -> Trajectory:
    """AdamW's models with `weight` times the reference's delta added once, after training.

    The simplest thing that could explain what online merging does, so every claim has to pass it.
    """
    points = []
    for step, params in [(0, subject.sft), *((c.step, c.params) for c in trained)]:
        merged = om.offline_merge(
            subject.base,
            [params, subject.sft],
            method="task_arithmetic",
            weights=[1.0, weight],
        )
        points.append(grade(lab.answers(merged, subject.questions), subject.questions, step))
        tick(1)
    settings = f"AdamW's models + {weight:g}·τ, added after training"
    return Trajectory("adamw_plus_delta", "AdamW + λτ", settings, "step", points, control=True)
