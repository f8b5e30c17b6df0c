"""Stages of the second scale: commands of this program, each skipped when it is done."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from train.commands import dpo, evaluate, merge, sft
from train.config import (
    DPOConfig,
    EvalConfig,
    MergeConfig,
    MergeModelOptions,
    PreferenceEvalOptions,
    SFTConfig,
)
from train.config.command_line import configured
from train.evaluation.tasks import as_metrics
from train.files.metrics_log import read_metrics
from train.taxbench.language_model.data import SFT_FILES, task_set
from train.taxbench.language_model.sizes import Size

CONFIGS = Path(__file__).parents[2] / "configs"
ALPHA_TOTAL = 0.1
"""α times the number of steps, which decides (docs/taxbench.md)."""
PLUS_DELTA = "adamw_plus_delta"
"""Key of the control that adds a share of τ after training, before the share."""
BETA = 0.1
"""β of the margins that are reported, whatever a method is trained with."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to align; a control is there to judge the others by."""

    label: str  # in tables and plots
    optimizer: str  # train/configs/smollm2_{optimizer}.yaml has its settings
    beta: float = BETA  # of the loss
    alpha_total: float | None = None  # α times the number of steps, for those that merge
    rate: float = 1.0  # peak learning rate, as a multiple of AdamW's
    control: bool = False


# As the miniature chose them (docs/taxbench/report.md). With α = 0 no τ would be held, whose signs are
# to have their vote in the control.
METHODS = {
    "adamw": Method("AdamW", "adamw"),
    "kl": Method("AdamW, β = 0.3", "adamw", beta=0.3),
    "on_ties": Method("OnTIES, p = 0.1", "on_ties", alpha_total=ALPHA_TOTAL),
    "on_dare": Method("OnDARE, p = 0.5", "on_dare", alpha_total=ALPHA_TOTAL),
    "on_ties_large": Method(
        "OnTIES, p = 0.1, 3 × lr, β = 0.3",
        "on_ties",
        beta=0.3,
        alpha_total=ALPHA_TOTAL / 2,
        rate=3.0,
    ),
    "largest": Method(
        "largest entries alone, p = 0.1, 3 × lr, β = 0.3", "keep_largest", beta=0.3, rate=3.0
    ),
    "sign_mask": Method("control: OnTIES, α = 0", "on_ties", alpha_total=1e-7, control=True),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluated model.

    Attributes:
        method: Key of `METHODS`; or base, sft, or the name of a kind of merge.
        at: Steps of alignment, or the weight of AdamW's model in a merge.
        margin: Held-out reward margin over the SFT model at β = `BETA`; 0 for that model itself, None
            for the base.
        accuracy: Share of held-out pairs with a positive margin; None for both.
        metrics: Scores of the tasks, by their names in a run's log.
    """

    method: str
    label: str
    seed: int
    at: float
    margin: float | None
    accuracy: float | None
    metrics: Mapping[str, float]
    control: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: its model, its directory, its size, and the stages that it consists of."""

    model: str  # directory of the model before SFT, or a hub name
    size: Size
    directory: Path  # gets data, runs and results
    methods: Sequence[str]  # keys of `METHODS`
    seeds: int  # how many
    console: Console  # announces the stages

    @property
    def data(self) -> Path:
        """Directory of the prepared records."""
        return self.directory / "data"

    def stages(self) -> Iterator[list[Point]]:
        """Does every stage that is not done yet; yields the models evaluated in each."""
        base = self._evaluated(self.model, self.directory / "base.json")
        yield [Point("base", "before SFT", 0, 0, None, None, base)]
        for seed in range(self.seeds):
            self._announce(seed, "SFT")
            sft.train_sft(self.sft_config(seed))
            start = self._evaluated(self._export(seed, "sft"), self._place(seed) / "sft.json")
            yield [Point("sft", "SFT", seed, 0, 0.0, None, start)]
            for name in self.methods:
                self._announce(seed, METHODS[name].label)
                dpo.train_dpo(self.dpo_config(seed, name))
                yield self._points_of_run(seed, name)
            for name, label, weight, config in self.merges(seed):
                self._announce(seed, f"{label}, weight {weight:g}")
                yield [self._merged(seed, name, label, weight, config)]

    def sft_config(self, seed: int) -> SFTConfig:
        """Makes the settings of the fine-tuning, as of ``python -m train sft``."""
        size, first = self.size, str(self.data / f"{SFT_FILES[0]}.jsonl")
        values = {
            "model.path": self.model,
            "model.dtype": size.dtype,
            "data.path": first,
            "data.max_prompt_length": size.sft_lengths[0],
            "data.max_completion_length": size.sft_lengths[1],
            "output_dir": self._place(seed) / "sft",
            "trainer.steps": size.sft_steps,
            "trainer.eval_every": "null",
            "trainer.save_every": max(size.sft_steps // 2, 1),
        }
        config = configured("sft", SFTConfig, self._flags(["sft"], values, seed))
        mix = {str(self.data / f"{name}.jsonl"): 1.0 for name in SFT_FILES[1:]}
        return dataclasses.replace(config, data=dataclasses.replace(config.data, mix=mix))

    def dpo_config(self, seed: int, name: str) -> DPOConfig:
        """Makes the settings of an alignment, as of ``python -m train dpo``."""
        size, method = self.size, METHODS[name]
        every = -(-size.dpo_steps // size.points)
        values = {
            "model.path": self._export(seed, "sft"),
            "model.dtype": size.dtype,
            "data.path": self.data / "pairs.jsonl",
            "data.eval_path": self.data / "held_out.jsonl",
            "data.max_prompt_length": size.pair_lengths[0],
            "data.max_completion_length": size.pair_lengths[1],
            "loss.beta": method.beta,
            "optimizer.learning_rate": method.rate * size.learning_rate,
            "output_dir": self._place(seed) / name,
            "reference_cache": self._place(seed) / "reference",
            "trainer.steps": size.dpo_steps,
            "trainer.eval_every": every,
            "trainer.save_every": every,
        }
        if method.alpha_total is not None:
            alpha = method.alpha_total / size.dpo_steps
            values |= {"optimizer.alpha": alpha, "optimizer.seed": seed, "model.base": self.model}
        files = ["dpo", method.optimizer]
        config = configured("dpo", DPOConfig, self._flags(files, values, seed))
        return dataclasses.replace(config, evaluation=task_set(self.data, size))

    def _flags(self, files: Sequence[str], values: Mapping[str, Any], seed: int) -> list[str]:
        shared = {
            "data.eval_fraction": "null",
            "data.buckets": self.size.buckets or "null",
            "trainer.batch_size": self.size.batch_size,
            "trainer.eval_batch_size": 2 * self.size.batch_size,
            "trainer.seed": seed,
        }
        configs = [f"--config={CONFIGS / f'smollm2_{file}.yaml'}" for file in files]
        return [*configs, *(f"--{name}={value}" for name, value in {**shared, **values}.items())]

    def merges(self, seed: int) -> list[tuple[str, str, float, MergeConfig]]:
        """Lists name, label, weight of AdamW's model and settings of every merge without training."""
        size, linear = self.size, {"method": "linear"}
        found = []
        for w in size.weights:
            config = self._merge(seed, "linear", w, 1 - w, linear)
            found.append(("offline_linear", "offline linear merge", w, config))
        arithmetic = {"method": "task_arithmetic", "base": self.model}
        for share in size.lambdas:
            name, label = f"{PLUS_DELTA}-{share:g}", f"control: AdamW, then + {share:g}·τ"
            for w in size.lambda_weights:
                # base + w·(adamw − base) + (1 − w + λ)·τ is sft + w·(adamw − sft) + λ·τ.
                config = self._merge(seed, name, w, 1 - w + share, arithmetic)
                found.append((name, label, w, config))
        return found

    def _merge(
        self, seed: int, name: str, weight: float, rest: float, settings: Mapping[str, Any]
    ) -> MergeConfig:
        """Makes the settings of a merge of AdamW's model, by `weight`, and the SFT model, by `rest`."""
        models = [
            MergeModelOptions(path=self._export(seed, "adamw"), weight=weight),
            MergeModelOptions(path=self._export(seed, "sft"), weight=rest),
        ]
        output = self._place(seed) / "merges" / f"{name}-{weight:g}"
        return MergeConfig(models=models, output=str(output), dtype="float32", **settings)

    def _merged(self, seed: int, name: str, label: str, at: float, config: MergeConfig) -> Point:
        """Scores a merge. The model itself, which is quickly made again, is not kept."""
        place = Path(config.output)
        result = place.with_name(f"{place.name}.json")
        if not result.exists() and not place.exists():
            merge.merge_models(config)
        metrics = self._evaluated(str(place), result, reference=self._export(seed, "sft"))
        shutil.rmtree(place, ignore_errors=True)
        return Point(name, label, seed, at, **_scores(metrics), control=name != "offline_linear")

    def _points_of_run(self, seed: int, name: str) -> list[Point]:
        method = METHODS[name]
        found = []
        for row in read_metrics(self._place(seed) / name / "metrics.jsonl"):
            if "eval_rewards/margins" in row:
                scores, at = _scores(row, method.beta), row["step"]
                found.append(Point(name, method.label, seed, at, **scores, control=method.control))
        return found

    def _evaluated(
        self, model: str, output: Path, reference: str | None = None
    ) -> dict[str, float]:
        """Scores a model under the names of a run's log; held-out pairs where a reference is given."""
        if not output.exists():
            pairs = None
            if reference is not None:
                pairs = PreferenceEvalOptions(
                    path=str(self.data / "held_out.jsonl"),
                    reference=reference,
                    beta=BETA,
                    max_prompt_length=self.size.pair_lengths[0],
                    max_completion_length=self.size.pair_lengths[1],
                )
            tasks = task_set(self.data, self.size)
            groups = {item.name: getattr(tasks, item.name) for item in dataclasses.fields(tasks)}
            evaluate.evaluate_model(
                EvalConfig(
                    model=model,
                    output=str(output),
                    preferences=pairs,
                    batch_size=2 * self.size.batch_size,
                    dtype=self.size.dtype,
                    **groups,
                )
            )
        results = json.loads(output.read_text())
        kinds = {kind: results[kind] for kind in ("tasks", "texts", "generation")}
        preferences = {f"eval_{k}": v for k, v in results.get("preferences", {}).items()}
        return as_metrics(kinds) | preferences

    def _place(self, seed: int) -> Path:
        return self.directory / f"seed-{seed}"

    def _export(self, seed: int, name: str) -> str:
        return str(self._place(seed) / name / "export")

    def _announce(self, seed: int, stage: str) -> None:
        self.console.rule(f"seed {seed}: {stage}")


def _scores(metrics: Mapping[str, float], beta: float = BETA) -> dict[str, Any]:
    """Picks the scores of a `Point` from held-out metrics whose rewards have this β."""
    tasks = ("eval_tasks/", "eval_texts/", "eval_generation/")
    return {
        "margin": BETA / beta * metrics["eval_rewards/margins"],
        "accuracy": metrics["eval_rewards/accuracies"],
        "metrics": {key: value for key, value in metrics.items() if key.startswith(tasks)},
    }
