"""Settings of every command as dataclasses; their docstrings are the command line's help.

A settings file (YAML) and flags fill the same fields: ``--trainer.steps 10`` is ``trainer: {steps:
10}``. Nothing heavy is imported here, so that ``--help`` and a misspelt field answer at once. The
ranges are checked by `check`, which every command calls before it reads a weight; fields that
belong to one optimizer are checked in `train.optimizers`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]
OptimizerName = Literal[
    "adamw", "on_dare", "on_ties", "on_dare_adamw", "on_ties_adamw", "child_tuning"
]


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what was found and what to do.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which weights to train and how they are held.

    Attributes:
        path: Directory in Hugging Face format (config.json, *.safetensors, tokenizer), or a hub
            name.
        dtype: Type of the computations (activations).
        param_dtype: Type of the parameters and of the optimizer state, float32 or bfloat16. With
            bfloat16 updates below about 1/512 of a parameter are lost to rounding.
        remat: Recompute each layer's activations in the backward pass: less memory, about a third
            more time.
        export_dtype: Type of the exported weights. Unset: as stored at `path`, so float32 results
            of a bfloat16 model are rounded.
    """

    path: str
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: bool = False
    export_dtype: DType | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(ModelOptions):
    """The aligned model: its start (which is also the reference), and the model before fine-tuning.

    Attributes:
        base: Directory or hub name of the pre-trained model behind `path`. The merging optimizers
            need it for the delta `path` − `base`; the others do not accept it.
    """

    base: str | None = None


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Records, and how they become tokens.

    Attributes:
        path: A .json, .jsonl, .jsonl.gz or .parquet file, or the name of a data set on the hub.
        split: Split of a hub data set.
        eval_fraction: Share of `path` held out for evaluation, by prompt: a prompt never lands on
            both sides. Unset: nothing is held out.
        split_seed: Seed of that split, apart from `trainer.seed` so that runs share their held-out
            records.
        max_prompt_length: Tokens a prompt may have, the chat template included; longer ones lose
            their beginning, and are counted.
        max_completion_length: Tokens an answer may have, the end mark included; longer ones lose
            their end, and are counted.
        template: auto (messages through the tokenizer's chat template, strings as they are) or chat
            (strings too become turns of a conversation).
    """

    path: str
    split: str = "train"
    eval_fraction: float | None = None
    split_seed: int = 0
    max_prompt_length: int = 512
    max_completion_length: int = 512
    template: Literal["auto", "chat"] = "auto"


@dataclass(frozen=True, kw_only=True)
class DataOptions(RecordOptions):
    """Training records, and those to evaluate on.

    Attributes:
        eval_path: A separate file to evaluate on, instead of `eval_fraction`. With neither nothing
            is evaluated.
    """

    eval_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class SFTLossOptions:
    """Cross-entropy of the answers.

    Attributes:
        vocab_chunk: Work through the vocabulary in pieces of this many entries, so that the logits
            are never held whole; null: all at once; auto: in pieces when the vocabulary is large.
    """

    vocab_chunk: int | Literal["auto"] | None = "auto"


@dataclass(frozen=True, kw_only=True)
class PreferenceLossOptions(SFTLossOptions):
    """Preference loss.

    Attributes:
        type: Name of the loss: sigmoid (DPO), ipo, hinge, ...
        beta: Strength of the pull towards the reference.
        label_smoothing: Assumed share of pairs whose labels are swapped (cDPO); only for the
            sigmoid loss.
    """

    type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AdamWOptions:
    """AdamW with gradient clipping.

    Attributes:
        learning_rate: Peak learning rate.
        b1: Decay of the first moment. Unset: the optimizer's own default, as for the two below.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients of a larger global norm are scaled down to it; 0 turns clipping
            off.
    """

    learning_rate: float
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(AdamWOptions):
    """The optimizer. A field that the chosen one has no use for must stay unset.

    Attributes:
        name: adamw; on_dare or on_ties (merging after optax.adamw, whose weight decay is merged
            too); on_dare_adamw or on_ties_adamw (the authors' order: weight decay after the merge);
            child_tuning (random masks alone).
        alpha: Weight of the reference delta, 0 to 1; the policy's update gets 1 − alpha.
        density: Share of the entries that are kept, in (0, 1].
        every_k: Merge on every k-th step only.
        rescale: What makes up for dropped entries: inverse (divide by density), norm (keep the L1
            norm), none.
        delta_mask: fresh (a new random mask on the delta at each step) or fixed (one for the whole
            run, as in the authors' code).
        clip: Bound on the entries of the sparsified delta, and with rescale norm of the update; 0
            turns it off.
        election: Sign vote of TIES: unweighted (the authors' code) or weighted (the paper).
        threshold: How TIES finds the largest entries: exact, or sampled (faster; the share kept is
            off by about half a percent of itself).
        storage: How the delta is held: dense, sparse (kept entries alone; with random masks it needs
            delta_mask fixed) or pinned_host (in the host's memory, on an accelerator).
        rounding: stochastic or compensated (the reference term arrives, however small) or nearest.
        seed: Seed of the random masks and of the rounding.
        delta_dtype: Type in which the delta is held. Unset: that of the parameters.
        diagnostics: Whether to log the full set of merge/... metrics. Unset: only merge/alpha and
            alpha_total.
    """

    name: OptimizerName = "adamw"
    alpha: float | None = None
    density: float | None = None
    every_k: int | None = None
    rescale: Literal["inverse", "norm", "none"] | None = None
    delta_mask: Literal["fixed", "fresh"] | None = None
    clip: float | None = None
    election: Literal["unweighted", "weighted"] | None = None
    threshold: Literal["exact", "sampled"] | None = None
    storage: Literal["dense", "sparse", "pinned_host"] | None = None
    rounding: Literal["stochastic", "compensated", "nearest"] | None = None
    seed: int | None = None
    delta_dtype: DType | None = None
    diagnostics: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Learning rate over time.

    Attributes:
        type: Shape after the warm-up.
        warmup_steps: Steps in which the rate rises linearly from 0.
        final_scale: Share of the peak that is left at the last step (linear and cosine).
    """

    type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    final_scale: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """Length of the run, and what it writes when.

    Attributes:
        steps: Optimizer steps. Give this or `epochs`.
        epochs: Passes over the training records.
        batch_size: Records (pairs, for preferences) in a step, over all devices.
        eval_batch_size: Records in one evaluation batch. Unset: `batch_size`.
        eval_every: Evaluate after every so many steps, besides at the end. Unset: only at the end.
        save_every: Write a checkpoint after every so many steps, besides at the end. Unset: only at
            the end.
        keep: Checkpoints to keep.
        log_every: Steps from one line of metrics to the next.
        seed: Seed of the order of the records.
        fsdp: Devices over which parameters and batches are split. Unset: all of them.
    """

    batch_size: int
    steps: int | None = None
    epochs: float | None = None
    eval_batch_size: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    log_every: int = 1
    seed: int = 0
    fsdp: int | None = None


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
    """

    output_dir: str
    model: ModelOptions
    data: DataOptions
    optimizer: AdamWOptions
    trainer: TrainerOptions
    loss: SFTLossOptions = field(default_factory=SFTLossOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)


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
    """

    output_dir: str
    model: PolicyOptions
    data: DataOptions
    optimizer: OptimizerOptions
    trainer: TrainerOptions
    loss: PreferenceLossOptions = field(default_factory=PreferenceLossOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    reference_cache: str | None = None


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


# Fields that change what is written or shown, not what is learned: a resumed run may change them.
FREE_FIELDS = frozenset(
    {
        "output_dir",
        "reference_cache",
        "model.export_dtype",
        "trainer.eval_batch_size",
        "trainer.eval_every",
        "trainer.save_every",
        "trainer.keep",
        "trainer.log_every",
    }
)


def flatten(config: Any) -> dict[str, Any]:
    """A configuration as ``{"trainer.steps": 10, …}``, in the order of its fields."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{item.name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[item.name] = value
    return flat


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises `UserError` naming the field, what was found and what is expected."""
    if not condition:
        raise UserError(f"{name} must be {expected}, got {value!r}.")


def check(config: SFTConfig | DPOConfig) -> None:
    """Checks every range that needs no file.

    Raises:
        UserError: names the first field that cannot be used.
    """
    flat = flatten(config)
    positive = (
        "optimizer.learning_rate trainer.steps trainer.epochs trainer.batch_size "
        "trainer.eval_batch_size trainer.eval_every trainer.save_every trainer.keep "
        "trainer.log_every trainer.fsdp optimizer.eps"
    )
    for name in positive.split():
        require(flat[name] is None or flat[name] > 0, name, flat[name], "positive")
    chunk = config.loss.vocab_chunk
    require(not isinstance(chunk, int) or chunk > 0, "loss.vocab_chunk", chunk, "positive")
    for name in ("optimizer.weight_decay", "optimizer.max_grad_norm", "schedule.warmup_steps"):
        require(flat[name] >= 0, name, flat[name], "0 or larger")
    for name in ("trainer.seed", "data.split_seed", "optimizer.seed"):
        value = flat.get(name)
        require(value is None or 0 <= value < 2**32, name, value, "in [0, 2**32)")
    for name in ("optimizer.b1", "optimizer.b2"):
        require(flat[name] is None or 0 <= flat[name] < 1, name, flat[name], "in [0, 1)")
    require(
        0 <= flat["schedule.final_scale"] <= 1,
        "schedule.final_scale",
        flat["schedule.final_scale"],
        "in [0, 1]",
    )
    if config.model.param_dtype == "float16":
        raise UserError(
            "model.param_dtype is float16, in which the optimizer's moments underflow; use float32 "
            "(model.dtype may be lower)."
        )
    data = config.data
    if data.eval_path is not None and data.eval_fraction is not None:
        raise UserError(
            "data.eval_path and data.eval_fraction are both set; give the file to evaluate on, or "
            "the share to hold out."
        )
    if config.trainer.eval_every is not None and not (data.eval_path or data.eval_fraction):
        raise UserError(
            f"trainer.eval_every is {config.trainer.eval_every}, but there is nothing to evaluate "
            "on; give data.eval_fraction or data.eval_path, or unset it."
        )
    if config.schedule.type == "constant" and config.schedule.final_scale:
        raise UserError(
            f"schedule.final_scale is {config.schedule.final_scale}, but a constant schedule has "
            "no use for it; unset it, or choose another schedule.type."
        )
    check_records(data, "data")
    if (config.trainer.steps is None) == (config.trainer.epochs is None):
        raise UserError("Give exactly one of trainer.steps and trainer.epochs.")
    if isinstance(config, DPOConfig):
        loss = config.loss
        require(loss.beta > 0, "loss.beta", loss.beta, "positive")
        require(
            0 <= loss.label_smoothing < 0.5,
            "loss.label_smoothing",
            loss.label_smoothing,
            "in [0, 0.5)",
        )


def check_records(options: RecordOptions, name: str) -> None:
    """Checks the ranges of a group of record fields. Raises `UserError`."""
    for field_name in ("max_prompt_length", "max_completion_length"):
        value = getattr(options, field_name)
        require(value > 0, f"{name}.{field_name}", value, "positive")
    share = options.eval_fraction
    require(share is None or 0 < share < 1, f"{name}.eval_fraction", share, "between 0 and 1")
