"""The ranges of a training run that can be checked before a file is read."""

from __future__ import annotations

from train.config.base import UserError, flatten, require
from train.config.commands import DPOConfig, KTOConfig, SFTConfig
from train.config.data import check_records


def check(config: SFTConfig | DPOConfig | KTOConfig) -> None:
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
    if not isinstance(config, SFTConfig):
        require(config.loss.beta > 0, "loss.beta", config.loss.beta, "positive")
    if isinstance(config, DPOConfig):
        smoothing = config.loss.label_smoothing
        require(0 <= smoothing < 0.5, "loss.label_smoothing", smoothing, "in [0, 0.5)")
    if isinstance(config, KTOConfig) and config.loss.type == "kto":
        # The divergence comes from the other completions of a batch.
        size = config.trainer.batch_size
        require(size > 1, "trainer.batch_size", size, "at least 2 for loss.type kto")
