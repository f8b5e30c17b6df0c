"""The weight of the reference delta: over the steps of a run, and by the rewards of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import omerge_jax as om
from train.config import AdamWOptions, AlphaOptions, OptimizerOptions, ScheduleOptions
from train.optimizers.schedules import make_schedule

AlphaScale = Callable[[Mapping[str, jax.Array]], jax.Array]


def make_alpha(alpha: float | AlphaOptions | None, steps: int | None) -> Any:
    """Makes alpha as `omerge_jax` takes it: a number, a schedule or a relative weight.

    `check_optimizer` accepts the settings. `steps` are the updates of the whole run, needed where alpha
    has a schedule. Raises `UserError` where the warm-up is longer than the run.
    """
    if not isinstance(alpha, AlphaOptions):
        return alpha
    peak = alpha.relative if alpha.value is None else alpha.value
    assert peak is not None
    number: Any = peak
    if alpha.schedule != ScheduleOptions(type="constant"):
        if steps is None:
            raise ValueError("a schedule of alpha needs the number of steps.")
        number = make_schedule(alpha.schedule, peak, steps, "optimizer.alpha.schedule")
    if alpha.relative is None:
        return number
    return om.relative(number, scope=alpha.scope or "global")


def alpha_scale_of(options: AdamWOptions) -> AlphaScale | None:
    """Makes the factor that alpha gets in a step from the metrics of its loss.

    Returns ``f(metrics)``, float32: 1 where the batch ranks at least the share ``alpha.gate`` of its
    pairs right, else 0. Returns None where every step adds the reference.
    """
    alpha = options.alpha if isinstance(options, OptimizerOptions) else None
    if not isinstance(alpha, AlphaOptions) or alpha.gate is None:
        return None
    least = alpha.gate
    return lambda metrics: (metrics["rewards/accuracies"] >= least).astype(jnp.float32)
