"""Checks that the policy starts at the reference: rewards are 0 and the loss has a known value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from train.losses.preference import PreferenceLoss


def check_starts_at_reference(
    metrics: Mapping[str, Any], loss: PreferenceLoss | None = None, *, tolerance: float = 1e-2
) -> None:
    """Refuses a preference run whose policy is not the reference it is compared with.

    Before the first update every reward is 0 and the loss is the one of a zero margin: ln 2 for
    `sigmoid`, `1 / (4 β²)` for `ipo`, 1 for `hinge`. Anything else means that the cached reference
    log-probabilities belong to another model, other data or another template. A loss without a
    reference has nothing to check, and one that is mixed with cross-entropy has only its rewards.

    `metrics` are those of the first step of a fresh run, or of an evaluation before it, and `loss`
    made them; None is the default one. `tolerance` is the largest deviation of a mean reward from
    0, and of the loss relative to its expected value; the default leaves room for bfloat16. Raises
    `ValueError` that names every figure that is off.
    """
    loss = PreferenceLoss() if loss is None else loss
    if loss.needs_reference:
        _check(metrics, loss.at_reference(), tolerance)


def check_unpaired_start(
    metrics: Mapping[str, Any], *, beta: float, tolerance: float = 1e-2
) -> None:
    """`check_starts_at_reference` for KTO, where β times the divergence is 0 as well."""
    _check({**metrics, "kl": beta * float(metrics["kl"])}, None, tolerance)


def _check(metrics: Mapping[str, Any], expected: float | None, tolerance: float) -> None:
    names = ("rewards/chosen", "rewards/rejected", "kl")
    zeros = {name: float(metrics[name]) for name in names if name in metrics}
    wrong = [
        f"{name} = {value:.6g} instead of 0"
        for name, value in zeros.items()
        # The mean over a label that the batch lacks is NaN, and its log-probability with it.
        if not abs(value) <= tolerance
        and not math.isnan(float(metrics.get(name.replace("rewards/", "logps/"), 0.0)))
    ]
    loss = float(metrics["loss"])
    if expected is not None and not math.isclose(
        loss, expected, rel_tol=tolerance, abs_tol=tolerance * 1e-2
    ):
        wrong.insert(0, f"loss = {loss:.6g} instead of {expected:.6g}")
    if wrong:
        raise ValueError(
            f"The policy does not start at the reference model: {'; '.join(wrong)}. The reference "
            "log-probabilities were computed with another model, another data set or another "
            "tokenisation; delete the cached ones and start again."
        )
