"""Consensus ⊕: how a sparsified update and a sparsified reference delta become one update."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Consensus = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def linear() -> Consensus:
    """Weighted sum ``(1 - alpha) * update + alpha * delta`` (Eq. 4 of arXiv 2405.17931)."""
    return lambda update, delta, alpha: (1 - alpha) * update + alpha * delta


def sign(election: Literal["unweighted", "weighted"] = "unweighted") -> Consensus:
    """Weighted sum of the terms that have the elected sign; the others count as 0.

    Args:
      election: ``"unweighted"`` elects the sign of ``update + delta`` (the authors' code: the delta
        decides wherever it is larger than the update, whatever alpha). ``"weighted"`` elects the sign
        of the weighted sum, which keeps the larger term where the two disagree (the paper, Eq. 5-7).
        Zero counts as positive.

    Returns:
      A consensus ``(update, delta, alpha) -> array``.

    Raises:
      ValueError: an unknown election.
    """
    if election not in ("unweighted", "weighted"):
        raise ValueError(
            f"election must be 'unweighted' or 'weighted', got election = {election!r}"
        )

    def elect(update: jax.Array, delta: jax.Array, alpha: jax.Array) -> jax.Array:
        ours, theirs = (1 - alpha) * update, alpha * delta
        ballot = update + delta if election == "unweighted" else ours + theirs
        positive = ballot >= 0
        ours = jnp.where((update > 0) == positive, ours, 0)
        theirs = jnp.where((delta > 0) == positive, theirs, 0)
        return ours + theirs

    return elect
