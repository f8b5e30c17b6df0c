"""Learning rates, and other numbers, over the steps of a run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.config import ScheduleOptions, require


def make_schedule(
    options: ScheduleOptions, peak: float, steps: int, name: str = "schedule"
) -> optax.Schedule:
    """Makes the learning rate, or another number, as a function of the number of updates done.

    Linear and cosine schedules end at `steps`, the updates of the whole run. Raises `UserError`, which
    names the field `name` of the settings, where the warm-up is longer than the run.

    Example:
        >>> schedule = make_schedule(ScheduleOptions(type="linear", warmup_steps=2), 1.0, 6)
        >>> [float(schedule(step)) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warmup = options.warmup_steps
    require(warmup < steps, f"{name}.warmup_steps", warmup, f"smaller than the {steps} steps")
    match options.type:
        case "constant":
            shape = optax.constant_schedule(peak)
        case "linear":
            shape = optax.linear_schedule(peak, options.final_scale * peak, steps - warmup)
        case "cosine":
            shape = optax.cosine_decay_schedule(peak, steps - warmup, options.final_scale)
    if warmup == 0:
        return shape
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), shape], [warmup])


def learning_rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """Computes the rate of every update, float32 ``[steps]``, so that logging it later is free."""
    return np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step)))(jnp.arange(steps)))
