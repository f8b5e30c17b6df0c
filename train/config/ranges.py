"""The ranges of a training run that can be checked before a file is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from train.config.base import UserError, flatten, require
from train.config.commands import DPOConfig, GRPOConfig, KTOConfig, OnlineDPOConfig, SFTConfig
from train.config.data import SFTDataOptions, check_records
from train.config.online import check_groups, check_reward, check_sampling
from train.config.optimizer import AlphaOptions
from train.config.trainer import TrainerOptions

Config = SFTConfig | DPOConfig | KTOConfig | OnlineDPOConfig | GRPOConfig


def check(config: Config) -> None:
    """Checks every range that needs no file.

    Raises:
        UserError: names the first field that cannot be used.
    """
    flat = flatten(config)
    positive = (
        "optimizer.learning_rate trainer.steps trainer.epochs trainer.batch_size "
        "trainer.eval_batch_size trainer.eval_every trainer.save_every trainer.keep "
        "trainer.log_every trainer.gradient_accumulation_steps optimizer.eps "
        "mesh.data mesh.fsdp mesh.tensor"
    )
    for name in positive.split():
        require(flat[name] is None or flat[name] > 0, name, flat[name], "positive")
    chunk = config.loss.vocab_chunk
    require(not isinstance(chunk, int) or chunk > 0, "loss.vocab_chunk", chunk, "positive")
    not_negative = (
        "optimizer.weight_decay optimizer.max_grad_norm schedule.warmup_steps "
        "trainer.max_skipped_steps"
    )
    for name in not_negative.split():
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
    if data.eval_split is not None and data.eval_path is None:
        raise UserError(
            f"data.eval_split is {data.eval_split!r}, but there is no data.eval_path that it is a "
            "split of; give it, or unset data.eval_split."
        )
    held_out = data.eval_path or data.eval_fraction or config.evaluation.metric_prefixes
    if config.trainer.eval_every is not None and not held_out:
        raise UserError(
            f"trainer.eval_every is {config.trainer.eval_every}, but there is nothing to evaluate "
            "on; give data.eval_fraction, data.eval_path or tasks under evaluation, or unset it."
        )
    if config.schedule.type == "constant" and config.schedule.final_scale:
        raise UserError(
            f"schedule.final_scale is {config.schedule.final_scale}, but a constant schedule has "
            "no use for it; unset it, or choose another schedule.type."
        )
    check_held_out_use(config.trainer, config.evaluation.metric_prefixes)
    check_followers(config)
    lora = config.model.lora
    if lora is not None:
        require(lora.rank > 0, "model.lora.rank", lora.rank, "positive")
        require(lora.alpha > 0, "model.lora.alpha", lora.alpha, "positive")
        require(0 <= lora.seed < 2**32, "model.lora.seed", lora.seed, "in [0, 2**32)")
    check_records(data, "data")
    for path, weight in data.mix.items():
        require(weight > 0, f"data.mix: the weight of {path}", weight, "positive")
    require(data.path not in data.mix, "data.mix", data.path, "of other data sets than data.path")
    require(data.buckets is None or data.buckets > 0, "data.buckets", data.buckets, "positive")
    if isinstance(config, SFTConfig):
        check_packing(config.data)
    if (config.trainer.steps is None) == (config.trainer.epochs is None):
        raise UserError("Give exactly one of trainer.steps and trainer.epochs.")
    if not isinstance(config, SFTConfig | GRPOConfig):
        require(config.loss.beta > 0, "loss.beta", config.loss.beta, "positive")
    check_rows_for_splash(config)
    check_gate(config)
    if isinstance(config, OnlineDPOConfig):
        check_sampling(config.sampling)
        check_reward(config.reward)
    if isinstance(config, GRPOConfig):
        check_sampling(config.sampling)
        check_groups(config.sampling, config.reward)
        if config.data.prefix_sharing is True:
            raise UserError(
                "data.prefix_sharing is true, but grpo computes the prompt with every answer; unset it."
            )
        check_reuse(config)
    if isinstance(config, DPOConfig | OnlineDPOConfig):
        smoothing = config.loss.label_smoothing
        require(0 <= smoothing < 0.5, "loss.label_smoothing", smoothing, "in [0, 0.5)")
    if isinstance(config, KTOConfig) and config.loss.type == "kto":
        # The divergence comes from the other completions of a batch.
        size = config.trainer.batch_size
        require(size > 1, "trainer.batch_size", size, "at least 2 for loss.type kto")


def check_reuse(config: GRPOConfig) -> None:
    """Checks that nothing is saved while answers are in use. Raises `UserError`."""
    every, trainer = config.sampling.num_iterations, config.trainer
    for name in ("steps", "save_every", "eval_every"):
        value = getattr(trainer, name)
        if value is not None and value % every:
            raise UserError(
                f"trainer.{name} must be a multiple of sampling.num_iterations, {every}, got {value}: "
                "a checkpoint holds no sampled answers, so a run goes on only where new ones are "
                "sampled."
            )


def check_rows_for_splash(config: Config) -> None:
    """Raises `UserError` where answers share a prompt in a row, which splash attention cannot."""
    if config.model.attention != "splash" or not isinstance(config, DPOConfig | OnlineDPOConfig):
        return
    shared = config.data.prefix_sharing
    if shared is not False:
        raise UserError(
            "model.attention is splash, which keeps the sequences of a row apart, but "
            f"data.prefix_sharing is {shared}; set it to false."
        )


def check_gate(config: Config) -> None:
    """Raises `UserError` where alpha goes by a reward accuracy and the losses have none."""
    alpha = getattr(config.optimizer, "alpha", None)
    gate = alpha.gate if isinstance(alpha, AlphaOptions) else None
    if gate is not None and not isinstance(config, DPOConfig | OnlineDPOConfig):
        raise UserError(
            f"optimizer.alpha.gate is {gate}, a reward accuracy, which only losses on pairs have (dpo, "
            "online-dpo); unset it."
        )


def check_packing(data: SFTDataOptions) -> None:
    """Checks the settings of packed rows. Raises `UserError`."""
    length, buckets = data.packed_length, data.buckets
    require(length is None or length > 0, "data.packed_length", length, "positive")
    if length is not None and not data.packing:
        raise UserError(
            f"data.packed_length is {length}, but data.packing is not set; set it, or unset the length."
        )
    if data.packing and buckets is not None:
        raise UserError(
            f"data.buckets is {buckets}, but packed rows have one shape; unset it, or data.packing."
        )


def check_held_out_use(trainer: TrainerOptions, tasks: Sequence[str] = ()) -> None:
    """Checks early stop and the choice of a checkpoint by held-out metrics.

    Args:
        trainer: With both.
        tasks: What the metrics of the tasks under `evaluation` begin with.

    Raises:
        UserError: names the field.
    """
    stop = trainer.early_stop
    for name, used in (("early_stop", stop), ("export_best", trainer.export_best)):
        if used is not None and trainer.eval_every is None:
            raise UserError(
                f"trainer.{name} is set, but trainer.eval_every is not, so that nothing is evaluated "
                "before the end; give it, or unset the former."
            )
    if trainer.export_best is not None:
        _check_task("trainer.export_best", trainer.export_best, tasks)
    if stop is None:
        return
    if stop.metric is None and not stop.floors and not stop.max_drop:
        raise UserError(
            "trainer.early_stop has neither a metric nor floors nor max_drop; give one, or unset "
            "early_stop."
        )
    for name in (stop.metric, *stop.floors, *stop.max_drop):
        if name is not None:
            _check_task("trainer.early_stop", name, tasks)
    for name, drop in stop.max_drop.items():
        field = f"trainer.early_stop.max_drop: that of {name}"
        require(0 <= drop < math.inf, field, drop, "0 or larger")
        if name in stop.floors:
            raise UserError(
                f"trainer.early_stop has {name} both in floors and in max_drop; keep one of them."
            )
    require(stop.patience > 0, "trainer.early_stop.patience", stop.patience, "positive")
    require(stop.min_delta >= 0, "trainer.early_stop.min_delta", stop.min_delta, "0 or larger")
    if stop.mode is not None and stop.metric is None:
        raise UserError("trainer.early_stop.mode is set without a metric; give one, or unset mode.")


def _check_task(field: str, metric: str, tasks: Sequence[str]) -> None:
    """Raises `UserError` when a metric is that of a task which is not there."""
    kinds = ("eval_tasks/", "eval_texts/", "eval_generation/")
    if metric.startswith(kinds) and not metric.startswith(tuple(tasks)):
        found = ", ".join(f"{name}…" for name in tasks) or "none"
        raise UserError(
            f"{field} names {metric!r}, but there is no such task under evaluation; there "
            f"{'is' if len(tasks) < 2 else 'are'} {found}."
        )


def check_followers(config: Config) -> None:
    """Checks the average of the weights, and a reference that follows them. Raises `UserError`."""
    ema = config.trainer.ema
    if ema is not None:
        require(0 <= ema.decay < 1, "trainer.ema.decay", ema.decay, "in [0, 1)")
    if not isinstance(config, DPOConfig):
        return
    alpha, steps = config.ref_model_mixup_alpha, config.ref_model_sync_steps
    for name, value in (("ref_model_mixup_alpha", alpha), ("ref_model_sync_steps", steps)):
        if value is not None and not config.sync_ref_model:
            raise UserError(
                f"{name} is set to {value}, but sync_ref_model is not; set it, or unset {name}."
            )
    require(alpha is None or 0 < alpha <= 1, "ref_model_mixup_alpha", alpha, "in (0, 1]")
    require(steps is None or steps > 0, "ref_model_sync_steps", steps, "positive")
