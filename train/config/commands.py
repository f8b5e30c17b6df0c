"""Settings of the commands that train and export."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.config.base import DType
from train.config.data import DataOptions
from train.config.loss import PreferenceLossOptions, SFTLossOptions, UnpairedLossOptions
from train.config.model import ModelOptions, PolicyOptions
from train.config.optimizer import AdamWOptions, OptimizerOptions, ScheduleOptions
from train.config.trainer import TrainerOptions


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning of a model on prompts with answers.

    Attributes:
        output_dir: Directory of the run: settings, checkpoints, logs and the exported model. The
            same command given again resumes what it holds; it never holds two runs.
        model: The model.
        data: The data.
        optimizer: The optimizer.
        trainer: The training run.
        loss: The loss.
        schedule: The schedule.
        dry_run: Show token statistics, batches and the first examples with their loss masks, and
            stop before any weight is read.
    """

    output_dir: str
    model: ModelOptions
    data: DataOptions
    optimizer: AdamWOptions
    trainer: TrainerOptions
    loss: SFTLossOptions = field(default_factory=SFTLossOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Alignment of an SFT model on pairs of a chosen and a rejected answer.

    Attributes:
        output_dir: Directory of the run: settings, checkpoints, logs and the exported model. The
            same command given again resumes what it holds; it never holds two runs.
        model: The model.
        data: The data.
        optimizer: The optimizer.
        trainer: The training run.
        loss: The loss.
        schedule: The schedule.
        reference_cache: Directory for the reference's log-probabilities, keyed by the content of
            model and data, so that several runs can share it. Unset: inside `output_dir`.
        sync_ref_model: Let the reference follow the policy (TR-DPO, arXiv 2404.09656). Its weights
            are then held during training and its log-probabilities computed at every step; held-out
            rewards stay relative to the start.
        ref_model_mixup_alpha: Share of the policy in the new reference; 1 replaces it.
        ref_model_sync_steps: Steps from one update of the reference to the next.
        dry_run: Show token statistics, batches and the first examples with their loss masks, and
            stop before any weight is read.
    """

    output_dir: str
    model: PolicyOptions
    data: DataOptions
    optimizer: OptimizerOptions
    trainer: TrainerOptions
    loss: PreferenceLossOptions = field(default_factory=PreferenceLossOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    reference_cache: str | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float | None = None
    ref_model_sync_steps: int | None = None
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class KTOConfig:
    """Alignment of an SFT model on answers that are labelled desirable or not, one by one.

    Attributes:
        output_dir: Directory of the run: settings, checkpoints, logs and the exported model. The
            same command given again resumes what it holds; it never holds two runs.
        model: The model.
        data: The data, prompts with an answer and a label; of preference pairs both answers count.
        optimizer: The optimizer.
        trainer: The training run. The rows of a batch are drawn once, and are the same in every
            epoch.
        loss: The loss.
        schedule: The schedule.
        reference_cache: Directory for the reference's log-probabilities, keyed by the content of
            model and data, so that several runs can share it. Unset: inside `output_dir`.
        dry_run: Show token statistics, batches and the first examples with their loss masks, and
            stop before any weight is read.
    """

    output_dir: str
    model: PolicyOptions
    data: DataOptions
    optimizer: OptimizerOptions
    trainer: TrainerOptions
    loss: UnpairedLossOptions = field(default_factory=UnpairedLossOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    reference_cache: str | None = None
    dry_run: bool = False


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
    step: int | None = None
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
        "trainer.fsdp",
        "trainer.max_skipped_steps",
    }
)
