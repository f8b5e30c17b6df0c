"""Averages of the parameters in the training state: a moving average, and a synced reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class ParameterAverages:
    """Which averages a training state holds besides the parameters, and how they are updated.

    After every step ``ema ← decay · ema + (1 − decay) · params``, in float32. Every `sync_steps` steps
    ``reference ← α · params + (1 − α) · reference`` (TR-DPO, 1 is a hard update; Gorbatovski et al.,
    Learn Your Reference Model, https://arxiv.org/abs/2404.09656, Eq. 2 and 3). The state does not hold
    an average whose weight is None.
    """

    ema_decay: float | None = None
    mixup_alpha: float | None = None
    sync_steps: int = 1

    def init(self, params: Any) -> dict[str, Any]:
        """What a new state holds: ``ema`` (float32) and ``reference``, where they are asked for."""
        held = {}
        if self.ema_decay is not None:
            held["ema"] = jax.tree.map(_wide, params)
        if self.mixup_alpha is not None:
            held["reference"] = params
        return held

    def update(self, state: dict[str, Any], params: Any, step: jax.Array) -> dict[str, Any]:
        """The averages after a step, from the state before it and `step`, the steps done now."""
        held, decay = {}, self.ema_decay
        if decay is not None:
            # ema' = ema + (1 − decay) (params − ema)
            held["ema"] = jax.tree.map(
                lambda mean, new: mean + (1 - decay) * (_wide(new) - mean), state["ema"], params
            )
        if self.mixup_alpha is not None:
            held["reference"] = self._synced(state["reference"], params, step)
        return held

    def _synced(self, reference: Any, params: Any, step: jax.Array) -> Any:
        alpha, due = self.mixup_alpha, step % self.sync_steps == 0
        assert alpha is not None

        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            # reference' = α · params + (1 − α) · reference, every `sync_steps` steps
            mixed = (alpha * _wide(new) + (1 - alpha) * _wide(old)).astype(old.dtype)
            return jnp.where(due, mixed, old)

        return jax.tree.map(mix, reference, params)


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
