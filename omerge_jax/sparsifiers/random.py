"""F at random (DARE): every entry is kept with the same probability."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from omerge_jax.checks import check_number
from omerge_jax.sparsifiers.base import (
    Draw,
    DrawnSparsifier,
    Sparsifier,
    SparsifyContext,
    check_common,
    density_at,
    keeps_all,
    norm_ratio,
)
from omerge_jax.threshold.edge import per_layer


@dataclasses.dataclass(frozen=True)
class _Random(DrawnSparsifier):
    clip: jax.typing.ArrayLike | None
    eps: jax.typing.ArrayLike

    @property
    def takes_samples(self) -> bool:
        return self.draw is None

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        density = density_at(self.density, ctx.step)
        kept = x
        if not keeps_all(self.density):
            # F(x) = m ⊙ x with m ~ Bernoulli(p) (Eq. 3).
            kept = jnp.where(self.mask(x, density, ctx), x, 0)
            if self.rescale != "none":
                # F(x) = m ⊙ x / p, as dropout does, times the inverse: a division per entry would
                # cost as much as the mask.
                kept = kept * jnp.asarray(1 / density, kept.dtype)
        normed = self.rescale == "norm" and ctx.role == "update"
        if normed:
            # F(Δθ) ← F(Δθ) · ‖Δθ‖₁ / (‖F(Δθ)‖₁ + eps), the authors' code with its rescale flag.
            kept = kept * per_layer(norm_ratio(x, kept, ctx.layer_axes, self.eps), x)
        if self.clip is not None and (ctx.role == "delta" or normed):
            # F(x) ← min(max(F(x), −c), c), with c = clip.
            limit = jnp.asarray(self.clip, kept.dtype)
            kept = jnp.clip(kept, -limit, limit)
        return kept


def random(
    density: optax.ScalarOrSchedule,
    *,
    rescale: Literal["inverse", "norm", "none"] = "inverse",
    clip: jax.typing.ArrayLike | None = 1.0,
    seed: jax.typing.ArrayLike = 0,
    draw: Draw | None = None,
    eps: jax.typing.ArrayLike = 1e-6,
) -> Sparsifier:
    """Keeps each entry with probability ``density`` (DARE).

    Args:
      density: share kept, in (0, 1]; a float, a schedule of the step, or traced.
      rescale: ``"inverse"`` divides kept entries by ``density`` (unbiased; the authors' code, which
        uses dropout). ``"norm"`` gives the kept update the L1 norm of the dense one, per tensor (the
        authors' ``rescale`` flag; the delta is still divided by ``density``). ``"none"`` leaves them
        (the paper's text, Eq. 3).
      clip: the delta, and with ``"norm"`` the update, is clamped to ±clip; None for no clamp.
      seed: integer that, with the step, the leaf's path and the element's index, fixes the mask.
      draw: another source of masks, ``(x, density, ctx) -> bool array``; None for the counter-based
        one.
      eps: added to the norm that ``"norm"`` divides by, which shrinks updates of a smaller norm. The
        authors' code adds the eps of Adam, as `on_dare_adamw` does.

    Returns:
      A sparsifier.

    Raises:
      ValueError: an argument of another kind or out of range.

    Example:
      >>> from omerge_jax import SparsifyContext
      >>> ctx = SparsifyContext(step=jnp.int32(0), path=("w",), role="update")
      >>> sorted(set(random(0.5)(jnp.ones(100), ctx).tolist()))
      [0.0, 2.0]

    References:
      Yu et al., Language Models are Super Mario, https://arxiv.org/abs/2311.03099; Lu et al.,
      https://arxiv.org/abs/2405.17931, Eq. 3.
    """
    check_common(density, rescale, ("inverse", "norm", "none"), seed)
    check_number("eps", eps, "at least 0")
    if clip is not None:
        check_number("clip", clip, "above 0", "the largest size of an entry of the delta")
    return _Random(density, rescale, seed, draw, clip, eps)
