"""Checks of what callers give: one clear error each.

A number that is known when the check runs (a Python or numpy number, an array outside ``jax.jit``) is
checked at once. A traced one (a schedule, ``optax.inject_hyperparams``) is checked by
``checkify.debug_check``, which costs nothing under plain ``jax.jit`` and reports under
``checkify.checkify(update, errors=checkify.user_checks)``.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from omerge_jax.paths import Path, leaves_by_path, show

_INSIDE: dict[str, Callable[[Any], Any]] = {
    "in [0, 1]": lambda x: (x >= 0) & (x <= 1),
    "in (0, 1]": lambda x: (x > 0) & (x <= 1),
    "in [0, 1)": lambda x: (x >= 0) & (x < 1),
    "above 0": lambda x: (x > 0) & (x < np.inf),
    "at least 0": lambda x: (x >= 0) & (x < np.inf),
    "finite": lambda x: abs(x) < np.inf,
}


def is_number(value: Any, kind: Any = jnp.number) -> bool:
    """Whether ``value`` is a real scalar of a Python, numpy or JAX type, possibly traced."""
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.number, np.ndarray, jax.Array)
    ):
        return False
    dtype = getattr(value, "dtype", type(value))
    is_real = jnp.issubdtype(dtype, kind) and not jnp.issubdtype(dtype, jnp.complexfloating)
    return is_real and jnp.ndim(value) == 0


def check_number(name: str, value: Any, wanted: str, meaning: str = "") -> None:
    """Raises ValueError where ``value`` is not a number as ``wanted``, one of the keys of `_INSIDE`.

    The message names it by ``name``, and says what it means where that is given.
    """
    must = f"{name} {f'is {meaning} and ' if meaning else ''}must be "
    if not is_number(value):
        raise ValueError(f"{must}a number {wanted}, got {name} = {value!r}")
    if isinstance(value, Tracer):
        text = f"{must}{wanted}, got {name} = {{value}}"
        checkify.debug_check(_INSIDE[wanted](value), text, value=jnp.asarray(value))
    # As it is in numpy, since JAX would trace a comparison inside of jit.
    elif not _INSIDE[wanted](value if isinstance(value, int) else np.asarray(value)):
        raise ValueError(f"{must}{wanted}, got {name} = {value}")


def known(value: Any) -> float | None:
    """Returns a number that does not depend on the step and is not traced, else None."""
    return None if isinstance(value, Tracer) or not is_number(value) else float(value)


def check_schedule(name: str, value: Any, wanted: str, meaning: str = "") -> None:
    """Raises ValueError where ``value`` is no schedule and not a number as ``wanted``."""
    if not callable(value):
        check_number(name, value, wanted, meaning)


def check_integer(name: str, value: Any) -> None:
    """Raises ValueError where ``value`` is not an integer scalar."""
    if not is_number(value, jnp.integer):
        raise ValueError(f"{name} must be an integer, got {name} = {value!r}")


def check_choice(name: str, value: Any, options: Sequence[str]) -> None:
    """Raises ValueError where ``value`` is none of the ``options``."""
    if not isinstance(value, str) or value not in options:
        *others, last = map(repr, options)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {name} = {value!r}")


def check_callable(name: str, value: Any, arguments: Sequence[str], example: str) -> None:
    """Raises ValueError where ``value`` cannot be called with ``arguments``, as a factory cannot."""
    try:
        inspect.signature(value).bind(*arguments)
    except ValueError:  # a builtin that does not tell
        return
    except TypeError as error:
        raise ValueError(
            f"{name} must be a callable ({', '.join(arguments)}) -> array, such as {example} with its "
            f"parentheses, got {name} = {value!r}"
        ) from error


def check_not_swapped(alpha: Any, density: Any) -> None:
    """Raises ValueError where alpha and density look as if one had been given for the other.

    The paper goes down to densities of 1e-5 and weighs the reference by 5e-7. Nobody trains with fewer
    entries and a reference of 1 % or more. A density that is meant can be given as a schedule.
    """
    weight, share = known(alpha), known(density)
    if weight is not None and share is not None and share < 1e-5 and weight >= 1e-2:
        raise ValueError(
            "alpha is the weight of the reference (5e-7 in the paper) and density the share of entries "
            f"kept (down to 1e-5): they seem to be swapped, got alpha = {alpha} and density = "
            f"{density}; where this is meant, give density=optax.constant_schedule({density})"
        )


def is_float(path: Path, *arrays: Any) -> bool:
    """Whether a leaf is to be merged: floats are, integers and booleans pass as they are.

    ``arrays`` are its update and its parameter, None where unknown. Raises ValueError for complex ones.
    """
    dtypes = [array.dtype for array in arrays if array is not None]
    for dtype in dtypes:
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"{show(path)} is {dtype}, but only real parameters can be merged: leave it out with "
                "optax.masked, or split it with optax.contrib.split_real_and_imaginary"
            )
    return all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)


def check_whole(path: Path, leaf: Any) -> None:
    """Raises ValueError where a leaf inside ``jax.shard_map`` may be a shard of a leaf.

    Masks come from an entry's place in its leaf and thresholds from all entries of it: of a shard both
    would be wrong without a sign of it.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if not axes:
        return
    # An index varies over its axes; where JAX does not say so it does not keep track (check_vma=False).
    tracked = jax.typeof(jax.lax.axis_index(axes)).manual_axis_type.varying
    if not tracked or jax.typeof(leaf).manual_axis_type.varying:
        reason = "is another one on every device" if tracked else "may be a shard (check_vma=False)"
        names = ", ".join(map(repr, axes))
        raise ValueError(
            f"inside jax.shard_map or jax.pmap over {names}, {show(path)} {reason}, so that "
            "every shard would repeat one mask and find a threshold of its own: merge outside, under "
            "jax.jit with sharded parameters, or give shard_map whole leaves, which no in_specs split"
        )


def check_delta(delta: Any) -> None:
    """Raises ValueError where a delta, if it is not traced, is zero, has a NaN or is not of floats."""
    moves = []
    for path, leaf in leaves_by_path(delta).items():
        if isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)):
            return
        with jax.ensure_compile_time_eval():
            nonzero, finite = map(bool, _nonzero_and_finite(leaf))
        if nonzero and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"delta leaf {show(path)} is {leaf.dtype}, but a delta is a difference of "
                "floats; build it with omerge_jax.task_vector(reference_params, base_params)"
            )
        if not finite:
            raise ValueError(
                f"delta leaf {show(path)} has entries that are not finite; look for them in the "
                "parameters of the reference and of the base"
            )
        moves.append(nonzero)
    if moves and not any(moves):
        raise ValueError(
            "delta is zero everywhere: the reference and the base are the same parameters; give those "
            "from before the fine-tuning as the base, or alpha=0 for no reference term"
        )


@jax.jit
def _nonzero_and_finite(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.any(x != 0), jnp.all(jnp.isfinite(x))
