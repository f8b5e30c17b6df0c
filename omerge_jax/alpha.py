"""The weight of the reference relative to the step, instead of an absolute number."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from omerge_jax.checks import check_choice, check_number, check_schedule
from omerge_jax.paths import Path

ALPHA = "the weight of the reference delta (the update gets 1 - alpha)"
SHARE = "the part of a step's norm that the reference term gets"
Scope = Literal["global", "tensor"]


@dataclasses.dataclass(frozen=True)
class Relative:
    """What `relative` returns: a share of the step's norm, to be turned into alpha at every step."""

    share: optax.ScalarOrSchedule
    scope: Scope


Alpha = optax.ScalarOrSchedule | Relative


def alpha_at(alpha: Alpha, scale: Any, step: jax.Array) -> jax.Array | Relative:
    """Returns the alpha of a step, or its share of the norm, times ``scale``."""
    number = alpha.share if isinstance(alpha, Relative) else alpha
    number = number(step) if callable(number) else number
    name, meaning = ("share", SHARE) if isinstance(alpha, Relative) else ("alpha", ALPHA)
    check_number(name, number, "in [0, 1]", meaning)
    # α_t = scale · α(t); a share of the norm is scaled in the same way.
    number = jnp.asarray(number, jnp.float32) * jnp.asarray(scale, jnp.float32)
    return Relative(number, alpha.scope) if isinstance(alpha, Relative) else number


def alpha_of_leaves(
    alpha: Relative, squares: dict[Path, tuple[jax.Array, jax.Array]]
) -> dict[Path, jax.Array]:
    """Returns the alpha of every leaf: a scalar, or [*layers] with ``scope="tensor"``.

    ``alpha.share`` is evaluated at the step; ``squares`` are ‖F(Δθ)‖² and ‖F(τ_r)‖² of every tensor
    of every leaf, float32 [*layers]. Where one of them is 0, alpha is.
    """
    if alpha.scope == "global" and squares:
        ours, theirs = (sum(jnp.sum(pair[i]) for pair in squares.values()) for i in (0, 1))
        squares = dict.fromkeys(squares, (jnp.asarray(ours), jnp.asarray(theirs)))
    share = jnp.asarray(alpha.share, jnp.float32)
    alphas = {}
    for path, pair in squares.items():
        update_norm, delta_norm = map(jnp.sqrt, pair)
        # α·‖F(τ)‖ = share · (α·‖F(τ)‖ + (1 − α)·‖F(Δθ)‖), solved for α.
        ours, theirs = share * update_norm, (1 - share) * delta_norm
        known = (update_norm > 0) & (delta_norm > 0)
        alphas[path] = jnp.where(known, ours / jnp.where(known, ours + theirs, 1), 0)
    return alphas


def relative(share: optax.ScalarOrSchedule, *, scope: Scope = "global") -> Relative:
    """An alpha that follows the size of the steps.

    A fixed alpha has to be searched over decades (5e-7 in the paper): it weighs a step of the size of
    the learning rate against a delta that is a thousand times larger. Here the reference term gets a
    fixed share of every step, ``‖α·F(τ)‖ = share · (‖α·F(τ)‖ + ‖(1 − α)·F(Δθ)‖)``, and so fades with
    the learning rate. It costs one more pass over the updates and the delta.

    Args:
      share: the reference's share of the norm, in [0, 1]; a float, a schedule of the optimizer step,
        or traced. 0.05 is one part of reference to 19 of update.
      scope: ``"global"``: one alpha, from norms over all parameters. ``"tensor"``: one per tensor (per
        layer, with ``layer_axes``), in proportion even where the optimizer hardly moves a tensor.

    Returns:
      What takes the place of ``alpha`` in `online_merge`, `on_dare`, `on_ties` and the ready-made
      optimizers. ``merge_metrics`` reports the alpha that it led to (its mean over tensors).

    Raises:
      ValueError: a share outside [0, 1] or an unknown scope.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(optax.adamw(1e-6), om.on_dare(alpha=om.relative(0.05), density=0.5))
    """
    check_schedule("share", share, "in [0, 1]", SHARE)
    check_choice("scope", scope, ("global", "tensor"))
    return Relative(share, scope)
