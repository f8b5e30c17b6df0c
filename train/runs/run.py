"""A run: settings, model and data that `train.runs.set_up` has checked, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from train.config import DPOConfig, GRPOConfig, KTOConfig, OnlineDPOConfig, SFTConfig
from train.data import TokenDataset, make_buckets
from train.data.buckets import Buckets
from train.evaluation.tasks import Tasks
from train.files.run_directory import OutputDir
from train.models import ModelConfig
from train.models.trainable import Trained, split
from train.training.averages import ParameterAverages
from train.training.checkpoint import Checkpoints
from train.types import Params

Config = SFTConfig | DPOConfig | KTOConfig | OnlineDPOConfig | GRPOConfig


@dataclass(frozen=True)
class Run:
    """What a training command knows once everything given is checked.

    `model` has the types of this run, and `shapes` its parameters as `jax.ShapeDtypeStruct` with their
    shardings. `trained` says of a parameter's path whether it is trained. `tasks` are also scored at
    every evaluation. `steps` counts updates, and `schedule` is the learning rate. The state of an
    optimizer that merges still needs the delta. `mesh` is None for a single device.
    """

    config: Config
    output: OutputDir
    console: Console
    model: ModelConfig
    graphdef: nnx.GraphDef
    shapes: Params
    trained: Trained
    tokenizer: Any
    data: TokenDataset
    held_out: TokenDataset | None
    tasks: Tasks
    steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    mesh: Mesh | None

    @property
    def trained_shapes(self) -> Params:
        """The part of `shapes` that is trained."""
        return self.split(self.shapes)[0]

    def split(self, params: Params) -> tuple[Params, Params]:
        """Splits parameters, or their shapes, into those that are trained and the others."""
        return split(params, self.trained)

    @property
    def averages(self) -> ParameterAverages:
        """Averages of the parameters that the state holds."""
        config, ema = self.config, self.config.trainer.ema
        mixup = None
        if isinstance(config, DPOConfig) and config.sync_ref_model:
            mixup = config.ref_model_mixup_alpha
        return ParameterAverages(
            ema_decay=None if ema is None else ema.decay,
            mixup_alpha=mixup,
            sync_steps=getattr(config, "ref_model_sync_steps", 1),
        )

    @property
    def batches(self) -> int:
        """Batches of the whole run, some of which several steps may learn from."""
        return self.steps // self.config.steps_per_batch

    def show_buckets(self) -> Buckets:
        """Chooses the shapes of batches, and prints them."""
        count, size = self.config.data.buckets, self.config.trainer.batch_size
        buckets = make_buckets(self.data, size, count, steps=self.batches)
        self.console.print(f"Batches: {buckets.describe(self.data.arrays)}", highlight=False)
        return buckets

    @property
    def eval_batch_size(self) -> int:
        """Rows in an evaluation batch."""
        return self.config.trainer.eval_batch_size or self.config.trainer.batch_size

    @property
    def resumes(self) -> bool:
        """Whether training goes on from a checkpoint."""
        if not self.output.checkpoints.is_dir():
            return False
        with Checkpoints(self.output.checkpoints, read_only=True) as saved:
            return saved.latest() is not None

    def begin(self, inputs: Mapping[str, str]) -> None:
        """Claims the output directory; `inputs` are content hashes besides those of the data."""
        hashes = {**inputs, "data": self.data.fingerprint()}
        if self.held_out is not None:
            hashes["held_out"] = self.held_out.fingerprint()
        if self.tasks:
            hashes["tasks"] = self.tasks.fingerprint()
        aside = self.output.begin(self.config, hashes)
        if aside is not None:
            self.console.print(
                f"Another run ended here before its first checkpoint; its records are in {aside}.",
                highlight=False,
                soft_wrap=True,
            )
