"""Decoupled decay towards the start: a pull on everything training moved, or on part of it."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from omerge_jax.state import place_delta


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
    1 − ``rate`` a step. In alignment θ₀ is the fine-tuned model.

    Args:
      rate: share of the distance that is taken back in a step, in [0, 1]; a float, a schedule of the
        step, or traced.
      gate: m. ``"all"``: 1, which is L2-SP with decoupled decay. ``"opposing"``: 1 where θ − θ₀ has
        the sign opposite to τ_r, 0 elsewhere: what went against the fine-tuning is taken back, what
        went along with it stays.
      delta: τ_r, for ``gate="opposing"``; copied into the state by ``init``.

    Returns:
      A transformation with `AnchoredState`. Its ``update`` needs the parameters; updates keep their
      dtype.

    Raises:
      ValueError: ``rate`` out of range, an unknown ``gate``, a missing or superfluous ``delta``; and,
        when ``update`` is traced, missing parameters.

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
    if isinstance(rate, float | int) and not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    if gate not in ("all", "opposing"):
        raise ValueError(f"gate must be 'all' or 'opposing', got {gate!r}")
    if (delta is not None) != (gate == "opposing"):
        raise ValueError(
            f"gate={gate!r} {'needs' if delta is None else 'has no use for'} a delta; give delta= "
            "with gate='opposing', and only there"
        )

    def init(params: Any) -> AnchoredState:
        held = None if delta is None else place_delta(params, delta)
        return AnchoredState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params), held)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        if params is None:
            raise ValueError("anchored needs the parameters: tx.update(updates, state, params)")
        now = rate(state.step) if callable(rate) else rate

        def pull(update: jax.Array, param: jax.Array, start: jax.Array, tau: Any = None) -> Any:
            wide = jnp.promote_types(param.dtype, jnp.float32)
            moved = param.astype(wide) - start.astype(wide)
            if tau is not None:
                moved = jnp.where(moved * tau < 0, moved, 0)
            return (update.astype(wide) - now * moved).astype(update.dtype)

        trees = (updates, params, state.start)
        pulled = jax.tree.map(pull, *trees, *(() if delta is None else (state.delta,)))
        return pulled, state._replace(step=optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)
