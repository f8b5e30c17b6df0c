"""The state of an online merge, and how its reference delta is set."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from omerge_jax.checks import check_delta
from omerge_jax.paths import leaves_by_path, path_names, show
from omerge_jax.storage import DeltaFit, Recipe, is_delta_leaf


class OnlineMergeState(NamedTuple):
    """State of `online_merge`.

    Attributes:
      merge_count: int32 scalar, optimizer steps taken.
      reference_delta: τ_r with the structure of the parameters; ``UnsetDelta`` leaves until a delta
        is set, ``SparseDelta`` leaves with ``storage="sparse"``; None where alpha is 0, and
        ``optax.EmptyState()`` with ``storage="recompute"``.
      delta_fit: ``DeltaFit`` with a float32 [m], what the sparsifier fitted to the fixed delta when
        that was set; None where it fits nothing, or anew at every merge.
      merged_params: the parameters as the last merge left them, in their dtype; None for
        ``every_k=1``.
      rounding_state: state of `rounded`, and of what else follows the merge before updates are emitted.
      merge_scalars: float32 scalars by name, see `merge_metrics`.
    """

    merge_count: jax.Array
    reference_delta: Any
    delta_fit: DeltaFit | None
    merged_params: Any
    rounding_state: Any
    merge_scalars: dict[str, jax.Array]


def is_merge_state(node: Any) -> bool:
    """Whether ``node`` is the state of an online merge (a leaf test for tree maps)."""
    return isinstance(node, OnlineMergeState)


def merge_states(opt_state: Any) -> list[OnlineMergeState]:
    """Returns every online-merge state inside ``opt_state``, in tree order."""
    nodes = jax.tree.leaves(opt_state, is_leaf=is_merge_state)
    return [node for node in nodes if is_merge_state(node)]


def place_delta(template: Any, delta: Any) -> Any:
    """Returns ``delta`` in the structure of ``template``, matched by path, copied, held alike.

    The template is the delta of a state: ``UnsetDelta`` leaves, or an older delta. Leaves that it lacks
    (masked ones) are left out. Raises ValueError where the delta lacks a leaf or has one of another
    shape.
    """
    leaves = leaves_by_path(delta)

    def pick(key_path: tuple[Any, ...], wanted: Any) -> Any:
        path = path_names(key_path)
        if path not in leaves:
            known = ", ".join(show(p) for p in list(leaves)[:5])
            raise ValueError(
                f"delta has no leaf {show(path)} (it has {known}, …); build it with "
                "omerge_jax.task_vector from parameters of the same model"
            )
        leaf = leaves[path]
        if tuple(leaf.shape) != tuple(wanted.shape):
            raise ValueError(
                f"delta leaf {show(path)} has shape {tuple(leaf.shape)}, the parameter has "
                f"{tuple(wanted.shape)}"
            )
        if is_delta_leaf(wanted):
            recipe = wanted.recipe
        else:
            kind = getattr(getattr(wanted, "sharding", None), "memory_kind", None)
            recipe = Recipe("pinned_host" if kind == "pinned_host" else "dense")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(recipe.encode, leaf)
        return recipe.encode(jnp.asarray(leaf))

    return jax.tree_util.tree_map_with_path(pick, template, is_leaf=is_delta_leaf)


def with_delta(opt_state: chex.ArrayTree, delta: Any) -> Any:
    """Returns ``opt_state`` with the reference delta of every online merge inside it set.

    Merge states are found anywhere: in ``optax.chain``, ``masked``, ``partition``, ``MultiSteps``,
    ``inject_hyperparams``, ``apply_if_finite`` … A delta that was set before is replaced; a merge whose
    alpha is the literal 0 goes on without one. It is pure and works under ``jax.jit`` (also with
    ``out_shardings``; pass the delta as an argument, or it becomes a constant of the program) and
    ``jax.eval_shape``.

    Args:
      opt_state: what ``tx.init(params)`` returned.
      delta: τ_r, for example from `task_vector`; leaves [same shape as the parameter], any float
        dtype, matched to the parameters by the names on their path.

    Returns:
      The new optimizer state.

    Raises:
      ValueError: there is no online merge in ``opt_state`` that takes a delta, the delta lacks a
        parameter or has one of another shape; and, outside of ``jax.jit``, the delta is zero
        everywhere, has entries that are not finite, or is of integers.

    Example:
      >>> import optax, omerge_jax as om
      >>> params = {"w": jnp.ones(3)}
      >>> tx = optax.chain(optax.adamw(1e-3), om.on_dare(alpha=1e-3, density=0.5))
      >>> opt_state = om.with_delta(tx.init(params), {"w": jnp.full(3, 0.1)})
    """
    if all(isinstance(s.reference_delta, optax.EmptyState) for s in merge_states(opt_state)):
        raise ValueError(
            "opt_state holds no online merge that takes a delta; chain omerge_jax.on_dare or on_ties "
            "(with another storage than 'recompute') after the optimizer and call with_delta on its "
            "state"
        )
    check_delta(delta)

    def fill(node: Any) -> Any:
        if not is_merge_state(node) or not jax.tree.leaves(node.reference_delta, is_delta_leaf):
            return node
        return place_in_state(node, delta)

    return jax.tree.map(fill, opt_state, is_leaf=is_merge_state)


def place_in_state(state: OnlineMergeState, delta: Any) -> OnlineMergeState:
    """Returns the state of a merge with a delta, and with what the sparsifier fits to it."""
    held = place_delta(state.reference_delta, delta)
    if state.delta_fit is None:
        return state._replace(reference_delta=held)
    leaves, given = leaves_by_path(held, is_delta_leaf), leaves_by_path(delta)
    fit = state.delta_fit.fit
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in given.values()):
        values = jax.eval_shape(lambda given: fit(leaves, given), given)
    else:
        values = fit(leaves, given)
    # Mapped, as nnx.Optimizer wraps the arrays of a state.
    fitted = jax.tree.map(lambda _: values, state.delta_fit)
    return state._replace(reference_delta=held, delta_fit=fitted)
