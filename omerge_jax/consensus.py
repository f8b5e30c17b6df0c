"""Consensus ⊕: how a sparsified update and a sparsified reference delta become one update."""

from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from omerge_jax.checks import check_choice


class Consensus(Protocol):
    """⊕: any elementwise callable that makes one update of two terms."""

    def __call__(self, update: jax.Array, delta: jax.Array, alpha: jax.Array, /) -> jax.Array:
        """Returns the merge of F(Δθ) and F(τ_r); ``alpha`` broadcasts against both."""
        ...


def linear() -> Consensus:
    """Weighted sum ``(1 - alpha) * update + alpha * delta`` (Eq. 4 of arXiv 2405.17931).

    Example:
      >>> linear()(jnp.array([2.0]), jnp.array([10.0]), jnp.float32(0.25)).tolist()
      [4.0]
    """
    # F(Δθ) ⊕ F(τ_r) = (1 − α)·F(Δθ) + α·F(τ_r) (Eq. 4).
    return lambda update, delta, alpha: (1 - alpha) * update + alpha * delta


def sign(election: Literal["unweighted", "weighted"] = "unweighted") -> Consensus:
    """Weighted sum of the terms that have the elected sign; the others count as 0.

    Args:
      election: ``"unweighted"`` elects the sign of ``update + delta`` (the authors' code: the delta
        decides wherever it is larger than the update, whatever alpha: also at the end of a schedule of
        alpha that reaches 0). ``"weighted"`` elects the sign of the weighted sum, which keeps the
        larger term where the two disagree (the paper, Eq. 5-7). Zero counts as positive.

    Returns:
      A consensus ``(update, delta, alpha) -> array``.

    Raises:
      ValueError: an unknown election.

    Example:
      >>> update, delta, alpha = jnp.array([1.0, -1.0]), jnp.array([4.0, 2.0]), jnp.float32(0.25)
      >>> sign()(update, delta, alpha).tolist()
      [1.75, 0.5]
      >>> sign("weighted")(update, delta, alpha).tolist()
      [1.75, -0.75]
    """
    check_choice("election", election, ("unweighted", "weighted"))

    def elect(update: jax.Array, delta: jax.Array, alpha: jax.Array) -> jax.Array:
        # a = (1 − α)·F(Δθ), b = α·F(τ_r) (Eq. 5).
        ours, theirs = (1 - alpha) * update, alpha * delta
        # The elected sign: that of a + b, which is the larger term's where they disagree (Eq. 6), or
        # that of F(Δθ) + F(τ_r) (the authors' code).
        ballot = update + delta if election == "unweighted" else ours + theirs
        positive = ballot >= 0
        # The sum of the terms that have the elected sign (Eq. 7).
        ours = jnp.where((update > 0) == positive, ours, 0)
        theirs = jnp.where((delta > 0) == positive, theirs, 0)
        return ours + theirs

    return elect
