"""Which setting to change when a step does not fit."""

from __future__ import annotations

from train.config import DPOConfig
from train.plan.figures import Plan


def advice(config: DPOConfig, plan: Plan) -> list[str]:
    """Changes that make the step smaller, first those that spare most without changing the result."""
    capacity, state = plan.target.hbm, plan.memory.state
    if plan.fits is not False or capacity is None:
        return []
    if state.total > capacity:
        return _for_state(config, plan)
    return _for_temporaries(config, plan) + _for_state(config, plan)[:1]


def _for_temporaries(config: DPOConfig, plan: Plan) -> list[str]:
    found, trainer, data = [], config.trainer, config.data
    if config.model.remat != "full":
        found.append(f"model.remat full (now {config.model.remat}): layers are computed again.")
    if config.loss.vocab_chunk is None:
        found.append("loss.vocab_chunk auto (now all at once): logits in pieces.")
    if config.model.dtype == "float32":
        found.append("model.dtype bfloat16 (now float32): activations of half the size.")
    devices = plan.mesh["data"] * plan.mesh["fsdp"]
    rows = trainer.batch_size // devices // trainer.gradient_accumulation_steps
    if rows > 1:
        parts = 2 * trainer.gradient_accumulation_steps
        found.append(
            f"trainer.gradient_accumulation_steps {parts}: a chip now looks at {rows} pairs at once."
        )
    else:
        found.append(
            f"mesh.tensor {2 * plan.mesh['tensor']}: a chip has one pair, which more chips can share."
        )
    square = config.model.attention == "xla"
    reason = "attention's scores grow with the square" if square else "activations grow with them"
    found.append(
        f"data.max_prompt_length and data.max_completion_length (now {data.max_prompt_length} and "
        f"{data.max_completion_length}): {reason}."
    )
    return found


def _for_state(config: DPOConfig, plan: Plan) -> list[str]:
    found, optimizer = [], config.optimizer
    used = plan.mesh["data"] * plan.mesh["fsdp"] * plan.mesh["tensor"]
    if used < plan.target.chips:
        found.append(f"mesh: {used} of {plan.target.chips} chips are used.")
    least = plan.target.slices
    if plan.mesh["data"] > least:
        found.append(
            f"mesh.data {least} (now {plan.mesh['data']}): every group of chips holds the whole state."
        )
    delta = plan.memory.state.delta
    if delta and optimizer.delta_dtype is None and config.model.param_dtype == "float32":
        found.append("optimizer.delta_dtype bfloat16 (now float32).")
    if delta and optimizer.storage != "sparse" and (optimizer.density or 1) < 0.1:
        found.append("optimizer.storage sparse with delta_mask fixed: kept entries alone.")
    if delta and optimizer.storage in (None, "dense"):
        found.append(
            "optimizer.storage pinned_host: the delta in the host's memory, copied at every step."
        )
    if config.model.param_dtype == "float32":
        found.append(
            "model.param_dtype bfloat16 (now float32), with optimizer.rounding stochastic."
        )
    found.append("topology: a larger slice, over which the state is split.")
    return found
