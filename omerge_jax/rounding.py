"""How an update is rounded to what its parameter can hold.

A parameter θ moves in steps of one unit in the last place (ulp). The reference term α·τ is often
smaller: 5e-10 against an ulp of 1.9e-9 for a float32 weight of 0.02, or of 1.2e-4 in bfloat16. Adding
it rounds to nearest, which gives nothing, however many steps are taken.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from omerge_jax.checks import check_choice, check_integer, check_whole, is_float
from omerge_jax.numerics import wide_dtype, widened
from omerge_jax.paths import Path, leaves_by_path, map_by_path
from omerge_jax.random_mask import rounding_bits

Rounding = Literal["stochastic", "compensated", "nearest"]


def _grid(param: jax.Array, update: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the ulp, in the dtype of ``param``, of the larger of two values, and its inverse.

    ``update``, float32 or float64, is what is to be added to ``param``, of any float dtype and the same
    shape. Both results are powers of two per entry, in the dtype of ``update``.
    """
    # ulp = 2^⌊log₂ max(|θ|, |u|)⌋ · eps, with the eps of the dtype of θ.
    kind, wide = jnp.finfo(param.dtype), jnp.finfo(update.dtype)
    eps, word = float(kind.eps), jnp.uint32 if wide.bits == 32 else jnp.uint64
    largest = jnp.maximum(jnp.abs(param.astype(update.dtype)), jnp.abs(update))
    # Small values have a fixed ulp; without it, it would be lost below the normal numbers.
    floor = max(float(kind.smallest_normal), float(wide.smallest_normal) / eps)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(largest, floor), word)
    mantissa = word((1 << wide.nmant) - 1)
    exponent = bits & ~mantissa
    # Twice the exponent of 1 less the exponent of a power of two is that of its inverse.
    one = (1 << (wide.nexp - 1)) - 1
    inverse = word(2 * one << wide.nmant) - exponent

    def power(exponent: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(exponent, update.dtype)

    return power(exponent) * eps, power(inverse) * (1 / eps)


def round_stochastically(update: jax.Array, param: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds an update to a multiple of its parameter's ulp, up or down at random, without bias.

    ``update`` is float32 or float64, ``bits`` are uniform uint32, all of one shape. The result has the
    dtype of ``update``; its mean over ``bits`` is ``update``, up to the last digit of that. A parameter
    that has the digits of its update and is less than four times as large gets a multiple of a coarser
    ulp, at most two of its own off (Zamirai et al., https://arxiv.org/abs/2010.06192).
    """
    if param.dtype == update.dtype:
        return _round_by_dither(update, param, bits)
    step, inverse = _grid(param, update)
    uniform = (bits >> 1).astype(jnp.int32).astype(update.dtype) * 2.0**-31
    # sign(u)·ulp·(⌊|u|/ulp⌋ + [r < |u|/ulp − ⌊|u|/ulp⌋]), r uniform in [0, 1): its mean is u.
    # Magnitudes, because fractions near 0 have more digits than fractions near 1.
    steps = jnp.abs(update) * inverse
    whole = jnp.floor(steps)
    # Compared, not added: the sum would be rounded once more, and upwards near the next whole.
    rounded = step * jnp.where(uniform < steps - whole, whole + 1, whole)
    # An infinite update has no grid; it must arrive as it is to be seen.
    return jnp.where(jnp.isinf(update), update, jnp.where(update < 0, -rounded, rounded))


def _round_by_dither(update: jax.Array, param: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds by adding noise of up to half an ulp, and a number whose ulp is the parameter's.

    Half the work of computing the grid. It needs the noise to be added to the update with many more
    digits than an ulp of the parameter has, which a narrower parameter's update does not have.
    """
    kind = jnp.finfo(param.dtype)
    word = jnp.uint32 if kind.bits == 32 else jnp.uint64
    exponent = word(((1 << kind.nexp) - 1) << kind.nmant)
    pattern = jax.lax.bitcast_convert_type(param, word) & exponent
    power = jax.lax.bitcast_convert_type(pattern, param.dtype)
    # Odd numbers between -2**23 and 2**23: never half an ulp, so that nothing is rounded to nothing.
    noise = ((bits.astype(jnp.int32) >> 8) | 1).astype(param.dtype)
    # With 2^e = 2^⌊log₂|θ|⌋, ulp = 2^e·eps, r in (−½, ½) and M = 1.5·2^e the result is
    # (M + (u + r·ulp)) − M = ulp·round(u/ulp + r) while |u + r·ulp| < 2^e/2: all floats from 2^e to
    # 2^(e+1) are multiples of ulp, so that the addition rounds to one and the subtraction is exact.
    # M, unlike the parameter, lies far from where the ulp changes.
    middle = 1.5 * power
    return (middle + (update + power * (noise * (2.0**-24 * float(kind.eps))))) - middle


def round_compensated(
    update: jax.Array, residual: jax.Array, param: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rounds an update to its parameter's ulp and keeps what was cut off for the next step.

    ``update`` and ``residual``, what earlier steps cut off, are float32 or float64 alike. Returns
    ``(rounded, residual)``, which add up to what was due (Kahan summation; Zamirai et al.).
    """
    # u + c is due; ulp·round((u + c)/ulp) is emitted, and the rest is the next c.
    due = update + residual
    step, inverse = _grid(param, due)
    rounded = jnp.where(jnp.isinf(due), due, step * jnp.round(due * inverse))
    return rounded, due - rounded


class RoundedState(NamedTuple):
    """State of `rounded`.

    Attributes:
      round_count: int32 scalar, steps taken.
      rounding_residual: what rounding cut off so far, float32 with the structure of the parameters;
        None unless it is compensated.
    """

    round_count: jax.Array
    rounding_residual: Any


def rounded(how: Rounding, *, seed: Any = 0) -> optax.GradientTransformationExtraArgs:
    r"""Rounds every update to what its parameter can hold. Chain it last.

    Where what it emits is added to the parameters as it is, the addition rounds nothing, and an update
    far below the last digit of its parameter arrives all the same. `online_merge` ends with it, so it
    is for other optimizers, and for merges with ``rounding="nearest"`` that something else follows.

    Args:
      how: ``"stochastic"``: up or down at random, so that updates arrive on average, without memory.
        ``"compensated"``: to nearest, and the rest is kept for the next step, which is exact and costs
        four bytes a parameter. ``"nearest"``: nothing is done and the addition rounds, which loses an
        update below half of a last digit for good.
      seed: integer that, with the step, the leaf's path and the element's index, fixes the random
        choices.

    Returns:
      A transformation with `RoundedState`. Its ``update`` needs the parameters. Updates of any float
      dtype keep it; for bfloat16 parameters widen the updates to float32 before what this follows, or
      they are rounded before they come here. Leaves of integers pass.

    Raises:
      ValueError: an unknown ``how``; and, when ``update`` is traced, missing parameters.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(optax.sgd(1e-3), om.rounded("stochastic"))
      >>> params = {"w": jnp.ones(1000, jnp.bfloat16)}
      >>> updates, _ = tx.update({"w": jnp.full(1000, 1.0)}, tx.init(params), params)
      >>> 0.0007 < -float(updates["w"].mean()) < 0.0013  # one ulp below 1 is 0.0039
      True

    References:
      Zamirai et al., Revisiting BFloat16 Training, https://arxiv.org/abs/2010.06192.
    """
    check_choice("rounding", how, get_args(Rounding))
    check_integer("seed", seed)
    if how == "nearest":
        return optax.with_extra_args_support(optax.identity())

    def init(params: optax.Params) -> RoundedState:
        residual = None
        if how == "compensated":
            # Made from the parameter, so that a sharded one gets a residual that is sharded alike.
            residual = jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p.dtype)), params)
        return RoundedState(jnp.zeros([], jnp.int32), residual)

    def update(updates: Any, state: RoundedState, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        if params is None:
            raise ValueError(
                f"rounding={how!r} rounds to what the parameters can hold: call update(updates, state, "
                "params), or give rounding='nearest', which loses most of a small reference term"
            )
        residuals = leaves_by_path(state.rounding_residual)

        def emit(path: Path, update: jax.Array, param: jax.Array) -> jax.Array:
            if not is_float(path, update, param):
                return update
            check_whole(path, update)
            wide = widened(update)
            if how == "compensated":
                emitted, residuals[path] = round_compensated(wide, residuals[path], param)
            else:
                bits = rounding_bits(wide.shape, seed=seed, step=state.round_count, path=path)
                emitted = round_stochastically(wide, param, bits)
            return emitted.astype(update.dtype)

        emitted = map_by_path(emit, updates, params)
        return emitted, RoundedState(
            jnp.asarray(optax.safe_increment(state.round_count)),
            map_by_path(lambda path, _: residuals[path], state.rounding_residual),
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
