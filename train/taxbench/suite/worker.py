"""One process of the suite: runs recipes on a seed and writes down every evaluated point."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import omerge_jax as om
from train.data.mismatched import rotation
from train.losses import PreferenceLoss, UnpairedLoss
from train.models import Decoder, split_model
from train.models.lora import TARGETS, fresh_adapters, merge_adapters
from train.models.trainable import join
from train.objectives.preference import preference_loss
from train.objectives.unpaired import unpaired_logps_fn, unpaired_loss
from train.optimizers.alpha import alpha_scale_of
from train.taxbench.miniature.examples import Batch
from train.taxbench.miniature.methods import OFFLINE_WEIGHTS, merged_by_weight, with_delta_added
from train.taxbench.miniature.report import environment
from train.taxbench.miniature.sizes import Sizes, models_file
from train.taxbench.miniature.subjects import Models, make_subject, on_host, train_models
from train.taxbench.miniature.training import MODEL, Lab, Params, Trainer, alignment_optimizer
from train.taxbench.miniature.trajectories import Point
from train.taxbench.suite.deltas import make_delta
from train.taxbench.suite.recipes import Merge, Recipe


class Bench:
    """The models of one seed, which `directory` keeps, and the runs on them."""

    def __init__(self, directory: Path, seed: int, sizes: Sizes):
        self.sizes, self.seed, self._lab = sizes, seed, Lab()
        path = models_file(directory, seed, sizes)
        if path.exists():
            self._models = Models.load(path)
        else:
            self._models = train_models(self._lab, seed, sizes)
            self._models.save(path)
        self.subject = make_subject(self._lab, self._models, seed, sizes)

    def run(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Trains by a recipe; returns its record and those of its merges."""
        began = time.perf_counter()
        points, models = self._train(recipe)
        record = self._record(recipe, points) | {"seconds": time.perf_counter() - began}
        return [record, *(self._merge(recipe, merge, models) for merge in recipe.merges)]

    def _record(self, recipe: Recipe, points: Sequence[Point], merge: Merge | None = None) -> dict:
        last = points[-1]
        return {
            "seed": self.seed,
            "run": recipe.fingerprint(),
            "merge": None if merge is None else merge.name,
            "at": [point.at for point in points],
            "reward": [round(point.reward, 5) for point in points],
            "capability": [round(point.capability, 5) for point in points],
            "last_by_family": self.subject.questions.by_family(last.right),
            "last_metrics": dict(last.metrics),
            "environment": environment(),
        }

    def _train(self, recipe: Recipe) -> tuple[list[Point], list[Params]]:
        subject, sizes = self.subject, self.sizes
        graphdef, start, frozen, whole = self._trained_part(recipe)
        loss, data = self._objective(recipe, graphdef)
        models = self._models
        delta = make_delta(recipe.delta, models.base, models.sft, models.earlier, self.seed)
        trainer = Trainer(
            loss,
            self._optimizer(recipe, delta),
            steps=sizes.steps,
            batch_size=sizes.batch_size,
            ema_decay=recipe.ema,
            alpha_scale=alpha_scale_of(recipe.optimizer),
        )
        points, kept = [subject.start], [subject.sft]
        for step, params, metrics in trainer.train(
            start,
            data,
            np.random.default_rng([subject.seed, 3]),
            every=sizes.eval_every,
            delta=None if recipe.optimizer.delta_storage is None else delta,
            frozen=frozen,
        ):
            model = whole(params)
            points.append(self._grade(model, step, metrics=metrics))
            if recipe.merges:
                kept.append(on_host(model))
        return points, kept

    def _grade(self, model: Params, at: float, **extra: Any) -> Point:
        return self._lab.grade(model, self.subject.questions, at, **extra)

    def _trained_part(self, recipe: Recipe) -> tuple[Any, Params, Params | None, Any]:
        """Returns structure, trained and frozen parameters, and a function that joins the two."""
        if recipe.lora_rank is None:
            return self._lab.graphdef, self.subject.sft, None, lambda params: params
        config = dataclasses.replace(
            MODEL, lora_targets=TARGETS, lora_rank=recipe.lora_rank, lora_scale=2.0
        )
        graphdef, _ = split_model(Decoder(config, nnx.Rngs(0)))
        adapters, sft = fresh_adapters(config, self.seed), self.subject.sft
        return graphdef, adapters, sft, lambda params: merge_adapters(join(params, sft), 2.0)

    def _optimizer(self, recipe: Recipe, delta: Any) -> optax.GradientTransformation:
        tx = alignment_optimizer(recipe.optimizer, self.sizes.steps)
        if recipe.anchor is None:
            return tx
        rate, gate = recipe.anchor
        of_gate: Any = {"gate": gate, "delta": delta if gate == "opposing" else None}
        return optax.chain(tx, om.anchored(rate, **of_gate))

    def _objective(self, recipe: Recipe, graphdef: Any) -> tuple[Any, Batch]:
        if recipe.loss == "kto":
            return unpaired_loss(graphdef, UnpairedLoss(beta=recipe.beta)), self._unpaired()
        loss = preference_loss(graphdef, PreferenceLoss(recipe.loss, beta=recipe.beta))
        return loss, self.subject.pairs

    def _unpaired(self) -> Batch:
        """Labels both answers of every pair, and adds mismatched ones for the divergence."""
        pairs = self.subject.pairs
        order = np.random.default_rng([self.seed, 4]).permutation(2 * len(pairs["index"]))

        def both(chosen: str, rejected: str) -> np.ndarray:
            return np.concatenate([pairs[chosen], pairs[rejected]])[order]

        data = {name: both(name, name) for name in ("prompt_tokens", "prompt_mask")}
        for part in ("tokens", "mask"):
            data[f"completion_{part}"] = both(f"chosen_{part}", f"rejected_{part}")
        data["label"] = order < len(pairs["index"])
        other = rotation(len(order), self.sizes.batch_size)
        data |= {f"kl_{part}": data[f"completion_{part}"][other] for part in ("tokens", "mask")}
        names = ("completion", "kl")
        logps = unpaired_logps_fn(self._lab.graphdef, names)(self.subject.sft, data)
        for name, values in zip(names, logps, strict=True):
            data[f"reference_{name}_logps"] = np.asarray(values)
        return data | {"index": np.arange(len(order), dtype=np.int32)}

    def _merge(self, recipe: Recipe, merge: Merge, models: Sequence[Params]) -> dict:
        """Grades a merge of the models that training has passed through; returns its record."""
        subject = self.subject
        if merge.method == "add_delta":
            assert merge.weight is not None
            every, weight = self.sizes.eval_every, merge.weight
            points = [
                self._grade(with_delta_added(subject, model, weight), every * number)
                for number, model in enumerate(models)
            ]
        else:
            options: Any = {} if merge.density is None else {"density": merge.density}
            merged = merged_by_weight(subject, models[-1], merge.method, **options)
            graded = map(self._grade, merged, OFFLINE_WEIGHTS)
            points = [dataclasses.replace(subject.start, at=0.0), *graded]
        return self._record(recipe, points, merge)


@functools.lru_cache(maxsize=1)
def bench(directory: Path, seed: int, sizes: Sizes) -> Bench:
    """Returns the bench of a seed; a process keeps the one that it used last."""
    jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return Bench(directory, seed, sizes)
