"""The methods that the benchmark compares, and how each makes its trajectory.

Settings are those that `python -m train taxbench --suite paper` chose on two other seeds, with bases of
their own, among four for each method, by mean capability where the reward first reaches 0.8
(docs/taxbench.md).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

import omerge_jax as om
from train.config import OptimizerOptions
from train.losses import PreferenceLoss, check_starts_at_reference
from train.objectives.preference import preference_loss
from train.taxbench.miniature.sizes import Sizes
from train.taxbench.miniature.subjects import Subject, on_host
from train.taxbench.miniature.training import Lab, Params, Tick, Trainer, alignment_optimizer
from train.taxbench.miniature.trajectories import Trajectory


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to align the fine-tuned model."""

    name: str
    label: str  # has "(p = 1)" in it where the density is 1 and nothing is dropped
    optimizer: OptimizerOptions  # as in `python -m train dpo`
    beta: float = 0.1  # strength of DPO's pull towards the reference

    def settings(self, steps: int) -> str:
        """Puts its settings in words, with the total weight of the reference delta over `steps`."""
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


def align(
    lab: Lab, subject: Subject, method: Method, sizes: Sizes, tick: Tick
) -> tuple[Trajectory, dict[int, Params]]:
    """Runs one method and scores it along the way.

    Returns its trajectory, and the parameters on the host at every step of it, the fine-tuned
    model's first.
    """
    loss = PreferenceLoss(beta=method.beta)
    trainer = Trainer(
        preference_loss(lab.graphdef, loss),
        alignment_optimizer(method.optimizer, sizes.steps),
        steps=sizes.steps,
        batch_size=sizes.batch_size,
        check_start=partial(check_starts_at_reference, loss=loss),
    )
    merges = method.optimizer.delta_storage is not None
    delta = om.task_vector(subject.sft, subject.base) if merges else None
    rng = np.random.default_rng([subject.seed, 3])
    points, models = [subject.start], {0: subject.sft}
    for step, params, metrics in trainer.train(
        subject.sft, subject.pairs, rng, every=sizes.eval_every, delta=delta, tick=tick
    ):
        points.append(lab.grade(params, subject.questions, step, metrics=metrics))
        models[step] = on_host(params)
    words = method.settings(sizes.steps)
    return Trajectory(method.name, method.label, words, "step", points), models


def merged_by_weight(
    subject: Subject, trained: Params, method: str, **options: Any
) -> Iterator[Params]:
    """Merges the fine-tuned model with a trained one, once for each of `OFFLINE_WEIGHTS`.

    The weight is that of the trained model; `method` and `options` are those of
    `omerge_jax.offline_merge`.
    """
    for weight in OFFLINE_WEIGHTS:
        if method == "slerp":
            yield om.offline_merge(subject.sft, [trained], method="slerp", t=weight)
        else:
            models, weights = [subject.sft, trained], [1 - weight, weight]
            yield om.offline_merge(subject.base, models, method=method, weights=weights, **options)


def with_delta_added(subject: Subject, model: Params, weight: float) -> Params:
    """Adds `weight` times the reference's delta to a model."""
    models, weights = [model, subject.sft], [1.0, weight]
    return om.offline_merge(subject.base, models, method="task_arithmetic", weights=weights)


def offline_linear(
    lab: Lab, subject: Subject, models: Mapping[int, Params], tick: Tick
) -> Trajectory:
    """Averages AdamW's last model with the fine-tuned one, over a grid of weights."""
    last, points = max(models), [subject.start]
    merged = merged_by_weight(subject, models[last], "linear")
    for weight, model in zip(OFFLINE_WEIGHTS, merged, strict=True):
        points.append(lab.grade(model, subject.questions, weight))
        tick(1)
    settings = f"(1 − w)·SFT + w·AdamW after {last} steps, w = 0.05 … 1"
    return Trajectory("offline_linear", "Offline linear", settings, "weight", points)


def add_delta(
    lab: Lab, subject: Subject, models: Mapping[int, Params], weight: float, tick: Tick
) -> Trajectory:
    """Adds `weight` times the reference's delta to each of AdamW's models, after training.

    The simplest thing that could explain what online merging does, so every claim has to pass it.
    """
    points = []
    for step, params in models.items():
        merged = with_delta_added(subject, params, weight)
        points.append(lab.grade(merged, subject.questions, step))
        tick(1)
    settings = f"AdamW's models + {weight:g}·τ, added after training"
    return Trajectory("adamw_plus_delta", "AdamW + λτ", settings, "step", points, control=True)
