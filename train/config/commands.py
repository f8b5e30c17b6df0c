"""Settings of the commands that train, plan a training run and export."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from train.config import ranges
from train.config.base import DType, UserError, require
from train.config.data import DataOptions, PromptDataOptions, SFTDataOptions
from train.config.devices import DistributedOptions, MeshOptions
from train.config.evaluation import TaskSetOptions
from train.config.loss import (
    GroupLossOptions,
    PreferenceLossOptions,
    SFTLossOptions,
    UnpairedLossOptions,
)
from train.config.model import ModelOptions, PolicyOptions
from train.config.online import (
    GroupRewardOptions,
    GroupSamplingOptions,
    RewardOptions,
    SamplingOptions,
)
from train.config.optimizer import AdamWOptions, AlphaOptions, OptimizerOptions, ScheduleOptions
from train.config.trainer import TrainerOptions


@dataclass(frozen=True, kw_only=True)
class _RunConfig:
    """What every training run has.

    Attributes:
        output_dir: Directory of the run: settings, checkpoints, logs and the exported model. The
            same command given again resumes what it holds; it never holds two runs.
        evaluation: What else to score at every evaluation: the tasks of the `eval` command. Metrics are
            logged as eval_tasks/NAME/accuracy, eval_texts/NAME/perplexity,
            eval_generation/NAME/exact_match and so on, and `trainer.early_stop` and
            `trainer.export_best` can go by them.
        dry_run: Show token statistics, batches and the first examples with their loss masks, and
            stop before any weight is read.
    """

    has_pairs: ClassVar[bool] = False  # whether the loss compares a chosen with a rejected answer

    output_dir: str
    data: PromptDataOptions
    model: ModelOptions
    trainer: TrainerOptions
    optimizer: AdamWOptions
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    evaluation: TaskSetOptions = field(default_factory=TaskSetOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    dry_run: bool = False

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps on a batch before the next one is taken."""
        return 1

    @property
    def records(self) -> DataOptions:
        """How records become tokens."""
        assert isinstance(self.data, DataOptions)
        return self.data

    def check_together(self, name: str) -> None:
        """Checks what needs pairs, and that evaluations have something to score. Raises `UserError`."""
        trainer, data, tasks = self.trainer, self.data, self.evaluation.metric_prefixes
        alpha = getattr(self.optimizer, "alpha", None)
        if isinstance(alpha, AlphaOptions) and alpha.gate is not None and not self.has_pairs:
            raise UserError(
                f"optimizer.alpha.gate is {alpha.gate}, a reward accuracy, which only losses on pairs "
                "have (dpo, online-dpo); unset it."
            )
        if self.model.attention == "splash" and self.has_pairs and data.prefix_sharing is not False:
            raise UserError(
                "model.attention is splash, which keeps the sequences of a row apart, but "
                f"data.prefix_sharing is {data.prefix_sharing}; set it to false."
            )
        if trainer.eval_every is not None and not (data.eval_path or data.eval_fraction or tasks):
            raise UserError(
                f"trainer.eval_every is {trainer.eval_every}, but there is nothing to evaluate on; "
                "give data.eval_fraction, data.eval_path or tasks under evaluation, or unset it."
            )
        if trainer.export_best is not None:
            _check_task("trainer.export_best", trainer.export_best, tasks)
        for metric in trainer.early_stop.metrics if trainer.early_stop is not None else ():
            _check_task("trainer.early_stop", metric, tasks)


def _check_task(field_name: str, metric: str, tasks: list[str]) -> None:
    """Raises `UserError` when a metric is that of a task which is not there."""
    kinds = ("eval_tasks/", "eval_texts/", "eval_generation/")
    if metric.startswith(kinds) and not metric.startswith(tuple(tasks)):
        found = ", ".join(f"{name}…" for name in tasks) or "none"
        raise UserError(
            f"{field_name} names {metric!r}, but there is no such task under evaluation; there "
            f"{'is' if len(tasks) < 2 else 'are'} {found}."
        )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(_RunConfig):
    """Supervised fine-tuning of a model on prompts with answers."""

    data: SFTDataOptions
    loss: SFTLossOptions = field(default_factory=SFTLossOptions)


@dataclass(frozen=True, kw_only=True)
class _AlignmentConfig(_RunConfig):
    """What every alignment of an SFT model on given answers has.

    Attributes:
        reference_cache: Directory for the reference's log-probabilities, keyed by the content of
            model and data, so that several runs can share it. Unset: inside `output_dir`.
    """

    data: DataOptions
    model: PolicyOptions
    optimizer: OptimizerOptions
    reference_cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class DPOConfig(_AlignmentConfig):
    """Alignment of an SFT model on pairs of a chosen and a rejected answer.

    Attributes:
        sync_ref_model: Let the reference follow the policy (TR-DPO, arXiv 2404.09656). Its weights
            are then held during training and its log-probabilities computed at every step; held-out
            rewards stay relative to the start.
        ref_model_mixup_alpha: Share of the policy in the new reference; 1 replaces it.
        ref_model_sync_steps: Steps from one update of the reference to the next.
    """

    has_pairs: ClassVar[bool] = True

    loss: PreferenceLossOptions = field(default_factory=PreferenceLossOptions)
    sync_ref_model: bool = False
    ref_model_mixup_alpha: ranges.Share = 0.6
    ref_model_sync_steps: ranges.PositiveInt = 512

    def check_together(self, name: str) -> None:
        """Checks the settings of a reference that moves as well. Raises `UserError`."""
        super().check_together(name)
        for field_name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            value = getattr(self, field_name)
            if not self.sync_ref_model and value != getattr(DPOConfig, field_name):
                raise UserError(
                    f"{field_name} is set to {value}, but sync_ref_model is not; set it, or unset "
                    f"{field_name}."
                )


@dataclass(frozen=True, kw_only=True)
class KTOConfig(_AlignmentConfig):
    """Alignment of an SFT model on answers that are labelled desirable or not, one by one.

    A preference pair counts as two answers. With loss.type kto the rows of a batch are drawn once, and
    are the same in every epoch.
    """

    loss: UnpairedLossOptions = field(default_factory=UnpairedLossOptions)

    def check_together(self, name: str) -> None:
        """Checks the batch for the loss as well. Raises `UserError`."""
        super().check_together(name)
        if self.loss.type == "kto":
            # The divergence comes from the other completions of a batch.
            size = self.trainer.batch_size
            require(size > 1, "trainer.batch_size", size, "at least 2 for loss.type kto")


@dataclass(frozen=True, kw_only=True)
class _OnPolicyConfig(_RunConfig):
    """What every alignment of an SFT model on its own answers has."""

    model: PolicyOptions
    optimizer: OptimizerOptions
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    @property
    def records(self) -> DataOptions:
        """How records become tokens, with the room that answers need."""
        data = {item.name: getattr(self.data, item.name) for item in fields(self.data)}
        # Records have no answers yet whose prompt could be shared.
        data |= {"max_completion_length": self.sampling.max_new_tokens, "prefix_sharing": False}
        return DataOptions(**data)


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(_OnPolicyConfig):
    """Alignment of an SFT model on pairs of its own answers, ranked by a reward (online DPO).

    In every step the policy answers each prompt of the batch twice; the answer with the higher score
    is the chosen one. The model at `model.path` is the reference, and its weights are held during
    training.

    Attributes:
        loss: The loss. Its ipo is that of `dpo`, averaged over the tokens of an answer; TRL's online
            trainer takes sums.
    """

    has_pairs: ClassVar[bool] = True

    reward: RewardOptions
    loss: PreferenceLossOptions = field(default_factory=PreferenceLossOptions)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(_OnPolicyConfig):
    """Alignment of an SFT model on groups of its own answers, scored by rewards (GRPO).

    In every step the policy answers each prompt of the batch `sampling.num_generations` times, and
    learns from how much better or worse than the others of its group an answer is.
    `trainer.batch_size` counts prompts; TRL's per_device_train_batch_size counts answers.
    """

    reward: GroupRewardOptions
    sampling: GroupSamplingOptions = field(default_factory=GroupSamplingOptions)
    loss: GroupLossOptions = field(default_factory=GroupLossOptions)

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps on the same answers."""
        return self.sampling.num_iterations

    def check_together(self, name: str) -> None:
        """Checks that nothing is saved while answers are in use. Raises `UserError`."""
        super().check_together(name)
        if self.data.prefix_sharing is True:
            raise UserError(
                "data.prefix_sharing is true, but grpo computes the prompt with every answer; unset it."
            )
        every = self.sampling.num_iterations
        for field_name in ("steps", "save_every", "eval_every"):
            value = getattr(self.trainer, field_name)
            if value is not None and value % every:
                raise UserError(
                    f"trainer.{field_name} must be a multiple of sampling.num_iterations, {every}, got "
                    f"{value}: a checkpoint holds no sampled answers, so a run goes on only where new "
                    "ones are sampled."
                )


@dataclass(frozen=True, kw_only=True)
class PlanConfig(DPOConfig):
    """What a step of a `dpo` run needs on a machine that need not be there.

    It takes the settings of `dpo` as they are. Of the model only config.json is read; nothing is
    allocated, and neither data nor weights need exist.

    Attributes:
        topology: What to plan for: a slice of TPUs such as v5p:4x4x8, v5e:4x4 or v6e:8x8, or
            several that a network joins, 2xv5e:4x4 (needs the package libtpu, no TPU); cpu:8, virtual
            devices of this machine; or GPUs by arithmetic alone, h100:8, h200:16, or gpu:8x80 for 8
            with 80 GB each.
        output_file: JSON file for the figures; an older plan is replaced. Unset: none is written.
        search: Try meshes, remat policies, parts of a batch and ways to hold the delta, and show the
            fastest that fit.
        output_dir: Directory of the run, which a plan does not touch.
    """

    topology: str
    output_file: str | None = None
    search: bool = False
    output_dir: str = ""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A run's checkpoint as a model directory in Hugging Face format.

    Attributes:
        run: Output directory of the run.
        output: Directory to write; it must be absent or empty.
        step: Step of the checkpoint. Unset: the last one.
        dtype: Type of the exported weights. Unset: what the run's `model.export_dtype` says.
    """

    run: str
    output: str
    step: ranges.PositiveInt | None = None
    dtype: DType | None = None


# Fields that change what is written or shown or where it is computed, not what is learned: a resumed
# run may change them.
FREE_FIELDS = frozenset(
    {
        "output_dir",
        "reference_cache",
        "dry_run",
        "model.export_dtype",
        "trainer.eval_batch_size",
        "trainer.eval_every",
        "trainer.save_every",
        "trainer.keep",
        "trainer.log_every",
        "trainer.max_skipped_steps",
        *(f"mesh.{item.name}" for item in fields(MeshOptions)),
        *(f"distributed.{item.name}" for item in fields(DistributedOptions)),
    }
)
