"""The training step: one `jax.jit` over a plain dict of parameters, optimizer state and counter.

Nothing here reads a value back from the device, so the host can prepare the next batch while a step
runs. The model is rebuilt from its graph definition inside the trace (`nnx.merge`), which costs
nothing at run time; the modules themselves never cross a `jit` boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import omerge_jax as om
from train.models.trainable import join, with_frozen
from train.objectives.accumulate import columns_in_parts, loss_and_gradient
from train.training.averages import Followers
from train.training.finite import keep_if_not_finite, no_skips

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
State = dict[str, Any]
LossFn = Callable[[Any, Batch], tuple[jax.Array, Metrics]]


def state_shardings(state: Any, params: Any, *, delta_on_host: bool = False) -> Any:
    """Where every array of a training state belongs.

    On a mesh a leaf of the state takes the sharding of the parameter whose key path its own path
    ends with and whose shape it has (moments, task vectors, the parameters themselves). The entries
    of a sparse task vector are split over all devices, whatever their places; anything else, such
    as counters, is replicated.

    Args:
      state: A training state of arrays or `jax.ShapeDtypeStruct`, as `init_state` makes.
      params: The parameters, with `jax.sharding.NamedSharding`.
      delta_on_host: The reference delta lies in the host's memory (``storage="pinned_host"``).

    Returns:
      A tree of shardings shaped like `state`; `None` when `params` are not on a mesh and everything
      lies in the memory of one device.
    """
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    by_path = {_key_names(path): leaf for path, leaf in paths}
    meshes = {
        leaf.sharding.mesh
        for leaf in by_path.values()
        if isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding)
    }
    if not meshes:
        return _beside_one_device(state) if delta_on_host else None
    mesh = meshes.pop()
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
        names = _key_names(path)
        for start in range(len(names)):
            parameter = by_path.get(names[start:])
            if parameter is not None and parameter.shape == leaf.shape:
                if delta_on_host and "reference_delta" in names:
                    return parameter.sharding.with_memory_kind("pinned_host")
                return parameter.sharding
            if names[-1] in ("places", "values") and names[start:-1] in by_path:
                return _split_last(leaf, mesh)
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)


def _beside_one_device(state: Any) -> Any:
    """The reference delta in the host's memory, the rest of a state in that of the first device."""
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    host = there.with_memory_kind("pinned_host")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: host if "reference_delta" in _key_names(path) else there, state
    )


def _split_last(leaf: Any, mesh: Any) -> jax.sharding.NamedSharding:
    """Over as many axes of the mesh, the slowest network last, as divide the last axis of a leaf."""
    axes, count = [], 1
    for axis in reversed(mesh.axis_names):
        if leaf.shape[-1] % (count * mesh.shape[axis]) == 0:
            axes.insert(0, axis)
            count *= mesh.shape[axis]
    spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), tuple(axes) or None)
    return jax.sharding.NamedSharding(mesh, spec)


def _key_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def init_state(
    params: Any,
    tx: optax.GradientTransformation,
    delta: Any = None,
    followers: Followers | None = None,
    *,
    delta_on_host: bool = False,
) -> State:
    """Start a run: a copy of the parameters, the optimizer's state, and step 0.

    Every array of the state is its own buffer, because the step donates them: `params` and `delta`
    stay valid, and are freed when the caller lets go of them.

    Args:
      params: Parameters, a tree of arrays. On a mesh, the optimizer state follows their shardings.
      tx: The optimizer.
      delta: Task vector for its online merge, set through `omerge_jax.with_delta`; `None` when
        the optimizer has no use for one.
      followers: Copies of the parameters to hold besides.
      delta_on_host: See `state_shardings`.

    Returns:
      `{"params", "opt_state", "step", "skipped"}`, and `"ema"` and `"reference"` of the followers;
      `step` is an int32 scalar and `skipped` holds the counters of `train.training.finite`.
    """
    copies = Followers() if followers is None else followers

    def init(params: Any, delta: Any) -> State:
        opt_state: Any = tx.init(params)
        if delta is not None:
            opt_state = om.with_delta(opt_state, delta)
        counters = {"step": jnp.zeros([], jnp.int32), "skipped": no_skips()}
        state = {"params": params, "opt_state": opt_state, **counters, **copies.init(params)}
        # Without the copy, jit hands an input that is returned as it is back as the same buffer.
        return jax.tree.map(jnp.copy, state)

    shape = jax.eval_shape(init, params, delta)
    shardings = state_shardings(shape, params, delta_on_host=delta_on_host)
    return jax.jit(init, out_shardings=shardings)(params, delta)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    shardings: Any = None,
    accumulate: int = 1,
    followers: Followers | None = None,
    reference_columns: Callable[[Any, Batch], Batch] | None = None,
    alpha_scale: Callable[[Metrics], jax.Array] | None = None,
    compiler_options: Mapping[str, bool] | None = None,
) -> Callable[..., tuple[State, Metrics]]:
    """The jitted `step(state, batch, frozen={}, models={}) -> (state, metrics)`.

    It consumes the state.

    Args:
      loss_fn: `loss_fn(params, batch) -> (loss, metrics)`, or a `train.objectives.accumulate.Parted`;
        its batch also holds `step`, the number of updates done, int32 `[]`.
      tx: The optimizer `state` was made with.
      shardings: Where the new state belongs, from `state_shardings`, so that a state keeps its
        layout from step to step.
      accumulate: Parts in which the batch is looked at, one after the other, see
        `train.objectives.accumulate.loss_and_gradient`.
      followers: As given to `init_state`.
      reference_columns: `f(params, batch)`: columns of a batch that come from the reference. Needed
        where the state holds a reference, whose parameters it is then given at every step.
      alpha_scale: What the weight of the reference is multiplied by in a step, from the metrics of
        `loss_fn`, see `train.optimizers.alpha.alpha_scale_of`; None for nothing.
      compiler_options: Of `jax.jit`, see `train.distributed.mesh.compiler_options`.

    Returns:
      A function of a state, a batch, the parameters that are not trained, a nested dict that
      belongs beside `state["params"]`, and what the optimizer's update is given besides:
      `reference_params` and `base_params` for a merge that recomputes its delta. Its metrics are
      float32 scalars on the device: `loss`, `grad_norm` (global norm before any clipping), those of
      `loss_fn`, `merge/<name>` for every scalar of `omerge_jax.merge_metrics` when the optimizer
      merges, and `skipped_steps` and `skipped_in_a_row` of `train.training.finite`: a step whose
      loss or gradient is not finite changes neither parameters nor optimizer nor followers.
    """
    tx = optax.with_extra_args_support(tx)
    copies = Followers() if followers is None else followers

    def step(
        state: State, batch: Batch, frozen: Any = None, models: Mapping[str, Any] | None = None
    ) -> tuple[State, Metrics]:
        frozen = {} if frozen is None else frozen
        batch = {**batch, "step": state["step"]}  # for losses whose settings change with it
        of_trained: Any = with_frozen(loss_fn, frozen) if frozen else loss_fn
        if "reference" in state:
            assert reference_columns is not None
            reference = join(state["reference"], frozen)
            known = columns_in_parts(reference_columns, reference, batch, accumulate)
            batch = {**batch, **jax.lax.stop_gradient(known)}
        gradient = loss_and_gradient(of_trained, accumulate)
        (loss, metrics), grads = gradient(state["params"], batch)
        extra = {} if models is None else dict(models)
        if alpha_scale is not None:
            extra["alpha_scale"] = alpha_scale(metrics)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"], **extra)
        params = optax.apply_updates(state["params"], updates)
        merge = {f"merge/{name}": value for name, value in om.merge_metrics(opt_state).items()}
        grad_norm, count = _global_norm(grads), state["step"] + 1
        new_state = {"params": params, "opt_state": opt_state, "step": count}
        new_state |= copies.update(state, params, count)
        new_state, skips = keep_if_not_finite(loss, grad_norm, new_state, state)
        metrics = {"loss": loss, "grad_norm": grad_norm, **metrics, **merge, **skips}
        return new_state, jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), metrics)

    out_shardings = None if shardings is None else (shardings, None)
    options: Any = None if compiler_options is None else dict(compiler_options)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings, compiler_options=options)


def _global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, summed in float32 whatever their dtype."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros([], jnp.float32)))
