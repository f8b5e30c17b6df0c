"""Task vectors: what fine-tuning added to a base model."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from omerge_jax.checks import check_choice
from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import Path, leaves_by_path, path_names, show


def task_vector(
    reference: Any,
    base: Any,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    on_mismatch: Literal["error", "zero"] = "error",
) -> Any:
    """Returns τ_r = reference − base, leaf by leaf.

    Leaves are matched by the names on their path, whatever the containers. The difference is taken in
    float32 (or in the wider of the two dtypes) before it is cast.

    Args:
      reference: parameters θ_r of the reference (SFT) model, the policy at step 0.
      base: parameters θ_b of the pre-trained base model.
      dtype: dtype of the result; None for the dtype of the difference, at least float32.
      on_mismatch: what to do with a leaf that ``base`` lacks or has in another shape: ``"error"``,
        or ``"zero"`` for a delta of zeros there (new heads, a resized vocabulary).

    Returns:
      A pytree with the structure of ``reference``. Integer leaves get a delta of zeros.

    Raises:
      ValueError: leaves are missing in ``base`` or differ in shape and ``on_mismatch`` is
        ``"error"`` (all of them are named), or a leaf is not an array, such as an activation function.

    Example:
      >>> task_vector({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.5, 2.5])})["w"].tolist()
      [0.5, -0.5]

    References:
      Ilharco et al., Editing Models with Task Arithmetic, https://arxiv.org/abs/2212.04089; Lu et
      al., https://arxiv.org/abs/2405.17931, Section 3.
    """
    check_choice("on_mismatch", on_mismatch, ("error", "zero"))
    base_leaves = leaves_by_path(base)
    problems = []

    def subtract(key_path: tuple[Any, ...], leaf: Any) -> jax.Array:
        path = path_names(key_path)
        ours = _as_array(leaf, path, "reference")
        wide = wide_dtype(ours.dtype)
        theirs = _as_array(base_leaves.get(path, ours), path, "base")
        if path not in base_leaves:
            problems.append(f"{show(path)} is missing in base")
        elif theirs.shape != ours.shape:
            problems.append(f"{show(path)} is {ours.shape} in reference, {theirs.shape} in base")
        elif jnp.issubdtype(ours.dtype, jnp.inexact):
            wide = wide_dtype(ours.dtype, theirs.dtype)
            return (ours.astype(wide) - theirs.astype(wide)).astype(dtype or wide)
        return jnp.zeros(ours.shape, dtype or wide)

    delta = jax.tree_util.tree_map_with_path(subtract, reference)
    if problems and on_mismatch == "error":
        raise ValueError(
            f"reference and base do not match in {len(problems)} leaves: {'; '.join(problems[:10])}"
            f"{'; …' if len(problems) > 10 else ''}. Give the base of this very model, or "
            "on_mismatch='zero' to leave those leaves without a delta"
        )
    return delta


def _as_array(leaf: Any, path: Path, tree: str) -> jax.Array:
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        raise ValueError(
            f"{show(path)} in {tree} is not an array, got {leaf!r}: give the arrays of a model alone, "
            "of an Equinox module eqx.filter(model, eqx.is_inexact_array)"
        ) from error
