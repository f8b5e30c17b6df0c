"""Decoupled decay towards the start: a pull on everything training moved, or on part of it."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from omerge_jax.checks import check_choice, check_delta, check_number, check_schedule, is_float
from omerge_jax.numerics import copied, wide_dtype
from omerge_jax.paths import path_names
from omerge_jax.state import place_delta

_RATE = "the share of the distance taken back in a step"


class AnchoredState(NamedTuple):
    """State of `anchored`.

    Attributes:
      step: int32 scalar, updates done.
      start: the parameters that ``init`` was given, in their dtype.
      delta: τ_r with the structure of the parameters; None with ``gate="all"``.
    """

    step: jax.Array
    start: Any
    delta: Any


def anchored(
    rate: optax.ScalarOrSchedule,
    *,
    gate: Literal["all", "opposing"] = "all",
    delta: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Pulls the parameters back to where they started: Δθ − rate · m ⊙ (θ − θ₀).

    Chain it last. The decay is decoupled from the optimizer, as AdamW's is from the gradient, so that
    ``rate`` means the same for every parameter: with no other update the distance shrinks by
    1 − ``rate`` a step. In alignment θ₀ is the fine-tuned model. Integer parameters are left alone.

    Args:
      rate: share of the distance that is taken back in a step, in [0, 1]; a float, a schedule of the
        step, or traced.
      gate: m. ``"all"``: 1, which is L2-SP with decoupled decay. ``"opposing"``: 1 where θ − θ₀ has
        the sign opposite to τ_r, 0 elsewhere: only what went against the fine-tuning is taken back.
      delta: τ_r, for ``gate="opposing"``; copied into the state by ``init``.

    Returns:
      A transformation with `AnchoredState`. Its ``update`` needs the parameters; updates keep their
      dtype.

    Raises:
      ValueError: ``rate`` out of range, an unknown ``gate``, a missing or superfluous ``delta``, or
        one that is zero or not finite; and, when ``update`` is traced, missing or complex parameters.

    Example:
      >>> import optax
      >>> tx = optax.chain(optax.sgd(0.0), anchored(0.25))
      >>> state = tx.init({"w": jnp.array([1.0])})
      >>> tx.update({"w": jnp.array([9.0])}, state, {"w": jnp.array([5.0])})[0]["w"].tolist()
      [-1.0]

    References:
      Li et al., Explicit Inductive Bias for Transfer Learning, https://arxiv.org/abs/1802.01483;
      Loshchilov and Hutter, https://arxiv.org/abs/1711.05101. The gate is this project's own.
    """
    check_schedule("rate", rate, "in [0, 1]", _RATE)
    check_choice("gate", gate, ("all", "opposing"))
    if (delta is not None) != (gate == "opposing"):
        raise ValueError(
            f"gate={gate!r} {'needs' if delta is None else 'has no use for'} a delta; give delta= "
            "with gate='opposing', and only there"
        )
    check_delta(delta)

    def init(params: Any) -> AnchoredState:
        held = None if delta is None else place_delta(params, delta)
        return AnchoredState(jnp.zeros([], jnp.int32), jax.tree.map(copied, params), held)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        if params is None:
            raise ValueError("anchored needs the parameters: tx.update(updates, state, params)")
        now = rate(state.step) if callable(rate) else rate
        check_number("rate", now, "in [0, 1]", _RATE)

        def pull(key_path: Any, update: Any, param: Any, start: Any, tau: Any = None) -> Any:
            if update is None or not is_float(path_names(key_path), update, param):
                return update
            wide = wide_dtype(param.dtype)
            moved = param.astype(wide) - start.astype(wide)
            if tau is not None:
                moved = jnp.where(moved * tau.astype(wide) < 0, moved, 0)
            # Δθ − rate · m ⊙ (θ − θ₀)
            return (update.astype(wide) - jnp.asarray(now, wide) * moved).astype(update.dtype)

        trees = (updates, params, state.start, *(() if delta is None else (state.delta,)))
        pulled = jax.tree_util.tree_map_with_path(pull, *trees, is_leaf=lambda leaf: leaf is None)
        return pulled, state._replace(step=optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)
