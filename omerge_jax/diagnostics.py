"""What a merge does, as scalars."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from omerge_jax.numerics import sum_together, wide_dtype
from omerge_jax.state import merge_states

# Entries of each tensor that the metrics are estimated from.
SAMPLE_ENTRIES = 2.0**18
# Set off from the names of hyperparameters, by which optax.tree.get finds things.
_PREFIX = "merge_"
# How many sums over all entries of a leaf the metrics are made from.
_SUMS = 12
_NAMES = "kept_share sign_agreement reference_ratio cosine update_norm rounding_lost"


def zero_scalars(diagnostics: bool) -> dict[str, jax.Array]:
    """Returns the scalars of a state before its first step."""
    names = ("alpha", "alpha_total", *(_NAMES.split() if diagnostics else ()))
    return prefixed({name: jnp.zeros([], jnp.float32) for name in names})


def prefixed(scalars: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the scalars by the names they have in the state."""
    return {_PREFIX + name: value for name, value in scalars.items()}


def leaf_sums(
    update: jax.Array,
    delta: jax.Array | None,
    kept: jax.Array,
    kept_delta: jax.Array | None,
    merged: jax.Array,
    param: jax.Array | None,
    alpha: jax.Array,
) -> jax.Array:
    """Returns the sums of one leaf, float32 [_SUMS].

    The arrays, all of one shape, are Δθ, τ_r or None, F(Δθ), F(τ_r) or None, what is emitted before
    it is rounded, and the parameter, None where it is unknown or a rounding follows.
    """
    delta = jnp.zeros_like(update) if delta is None else delta
    kept_delta = jnp.zeros_like(update) if kept_delta is None else kept_delta
    both = (kept != 0) & (kept_delta != 0)
    moving = merged != 0
    lost = jnp.zeros_like(moving)
    if param is not None:
        # An update is lost where θ + u, rounded to the dtype of θ, is θ. It is rounded explicitly, as a
        # compiler may carry a bfloat16 sum on in float32, where nothing is lost.
        wide, kind = wide_dtype(param.dtype), jnp.finfo(param.dtype)
        total = param.astype(wide) + merged.astype(wide)
        rounded = jax.lax.reduce_precision(total, kind.nexp, kind.nmant)
        lost = moving & (rounded - param.astype(wide) == 0)
    terms = [
        update != 0,
        kept != 0,
        both,
        both & ((kept > 0) == (kept_delta > 0)),
        jnp.square((1 - alpha) * kept),
        jnp.square(alpha * kept_delta),
        update * delta,
        jnp.square(update),
        jnp.square(delta),
        jnp.square(merged.astype(jnp.float32)),
        moving,
        lost,
    ]
    terms = [term.astype(jnp.float32) for term in terms]
    if update.ndim:
        # By rows: over all axes a float32 sum runs from entry to entry, and a count stops at 2**24.
        terms = sum_together(terms, (update.ndim - 1,))
    return jnp.stack([jnp.sum(term) for term in terms])


def scalars_from_sums(leaves: Sequence[jax.Array], *, knows_params: bool) -> dict[str, jax.Array]:
    """Returns the metrics of one step from the sums of every leaf, float32 [_SUMS] each."""
    total = sum(leaves, jnp.zeros([_SUMS], jnp.float32))
    proposed, kept, both, agree, ours, theirs, dot, *rest = total
    update_square, delta_square, merged_square, moving, lost = rest

    def share(part: jax.Array, whole: jax.Array) -> jax.Array:
        return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)

    return prefixed(
        {
            "kept_share": share(kept, proposed),
            "sign_agreement": share(agree, both),
            "reference_ratio": share(jnp.sqrt(theirs), jnp.sqrt(ours)),
            "cosine": share(dot, jnp.sqrt(update_square) * jnp.sqrt(delta_square)),
            "update_norm": jnp.sqrt(merged_square),
            "rounding_lost": share(lost, moving) if knows_params else jnp.float32(jnp.nan),
        }
    )


def merge_metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Returns what the last merge did, as float32 scalars.

    Args:
      opt_state: an optimizer state with an online merge anywhere inside it.

    Returns:
      A dict of scalars, empty where there is no online merge; where there are several (as with
      ``optax.partition``), the names get the suffix ``/0``, ``/1`` … in tree order. Always there:

      - ``alpha``: weight of the reference term at the last merge (with `relative` per tensor, its mean
        over entries).
      - ``alpha_total``: Σ alpha over the merges so far; how far the reference has been re-applied.

      With ``diagnostics`` also, of the last merge; from a sample of about 262144 entries of each larger
      tensor (1/64 of it at least), other ones at every step, so that no tensor is read once more:

      - ``kept_share``: entries of F(Δθ) that are not 0, among those of Δθ.
      - ``sign_agreement``: share of equal signs where F(Δθ) and F(τ_r) are both not 0.
      - ``reference_ratio``: ‖α·F(τ_r)‖ ÷ ‖(1−α)·F(Δθ)‖.
      - ``cosine``: cosine of Δθ and τ_r (F(τ_r) where the state holds that, ``storage="sparse"``).
      - ``update_norm``: norm of the emitted update, before it is rounded.
      - ``rounding_lost``: share of non-zero updates that leave their parameter as it was, lost to
        rounding: 0 unless ``rounding="nearest"``; NaN where ``update`` was called without params.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(optax.sgd(1.0), om.child_tuning(density=0.5))
      >>> sorted(om.merge_metrics(tx.init({"w": jnp.ones(2)})))
      ['alpha', 'alpha_total']
    """
    states = merge_states(opt_state)
    suffixes = [""] if len(states) == 1 else [f"/{i}" for i in range(len(states))]
    # Copies, so that they can still be read once the state has been donated to the next step.
    return {
        name.removeprefix(_PREFIX) + suffix: jnp.array(value, copy=True)
        for state, suffix in zip(states, suffixes, strict=True)
        for name, value in state.merge_scalars.items()
    }
