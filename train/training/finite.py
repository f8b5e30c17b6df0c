"""Steps whose loss or gradient is not finite change nothing but counters.

One bad batch then costs its own step, not the run. The choice is made on the device: the host reads
the counters with the other metrics. It is a selection and not a branch because the TPU compiler fuses
it into the update, at no bytes or memory; a branch costs it one more pass over the gradient. (On a CPU
it is the other way round: the selection needs room for one more copy of the parameters.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def no_skips() -> dict[str, jax.Array]:
    """The counters of a new run: ``{"total", "in_a_row"}``, int32 scalars."""
    return {"total": jnp.zeros([], jnp.int32), "in_a_row": jnp.zeros([], jnp.int32)}


def keep_if_not_finite(
    loss: jax.Array, grad_norm: jax.Array, new: dict[str, Any], old: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The new state where loss and gradient are finite, otherwise the old one, and metrics.

    A finite norm of the gradient, which is a root of a sum of squares, also means that its moments
    are finite. What the step does not change, such as a delta, is not touched. `new` has its ``step``
    counted up and no ``skipped``; `old` holds the counters of `no_skips`. Both count on in the result
    in any case. The metrics are ``skipped_steps`` (total) and ``skipped_in_a_row``.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def choose(after: Any, before: Any) -> Any:
        return after if after is before else jnp.where(finite, after, before)

    before = {name: value for name, value in old.items() if name != "skipped"}
    state = jax.tree.map(choose, new, before)
    skipped = {
        "total": old["skipped"]["total"] + ~finite,
        "in_a_row": jnp.where(finite, 0, old["skipped"]["in_a_row"] + 1),
    }
    metrics = {"skipped_steps": skipped["total"], "skipped_in_a_row": skipped["in_a_row"]}
    return {**state, "step": new["step"], "skipped": skipped}, metrics
