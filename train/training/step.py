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
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

import omerge_jax as om
from train.models.trainable import join
from train.objectives.accumulate import columns_in_microbatches, loss_and_gradient, with_frozen
from train.training.averages import ParameterAverages
from train.training.finite import keep_if_not_finite, no_skips
from train.types import Batch, LossFn, Metrics, Params, State


def state_shardings(state: Any, params: Any, *, delta_on_host: bool = False) -> Any:
    """Where every array of a training state, or of its `jax.ShapeDtypeStruct`, belongs.

    On a mesh a leaf of the state takes the sharding of the parameter whose key path its own path
    ends with and whose shape it has (moments, task vectors, the parameters themselves). The entries
    of a sparse task vector are split over all devices, whatever their places; anything else, such
    as counters, is replicated. With `delta_on_host` (``storage="pinned_host"``) the reference delta
    lies in the host's memory. None when `params` are not on a mesh and all of the state lies in the
    memory of one device.
    """
    by_path = {_key_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    places = [getattr(leaf, "sharding", None) for leaf in by_path.values()]
    mesh = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    if mesh is None:
        return _on_one_device(state) if delta_on_host else None
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> Sharding:
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


def _on_one_device(state: Any) -> Any:
    """The reference delta in the host's memory, the rest of a state in that of the first device."""
    device = SingleDeviceSharding(jax.devices()[0])
    host = device.with_memory_kind("pinned_host")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: host if "reference_delta" in _key_names(path) else device, state
    )


def _split_last(leaf: Any, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> NamedSharding:
    """Splits the last axis over as many axes of the mesh as divide it, the fastest network first."""
    axes, count = [], 1
    for axis in reversed(mesh.axis_names):
        if leaf.shape[-1] % (count * mesh.shape[axis]) == 0:
            axes.insert(0, axis)
            count *= mesh.shape[axis]
    return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), tuple(axes) or None))


def _key_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    delta: Any = None,
    averages: ParameterAverages | None = None,
    *,
    delta_on_host: bool = False,
) -> State:
    """Starts a run: a copy of the parameters, the optimizer's state, and step 0.

    Every array of the state is its own buffer, because the step donates them: `params` and `delta`
    stay valid, and are freed when the caller lets go of them. On a mesh, the optimizer state follows
    the shardings of `params`. `delta` is the task vector for an online merge, None for an optimizer
    without one; `averages` are held besides; `delta_on_host` is as in `state_shardings`.

    Returns `{"params", "opt_state", "step", "skipped"}`, and `"ema"` and `"reference"` of the averages;
    `step` is an int32 scalar and `skipped` holds the counters of `train.training.finite`.
    """

    def init(params: Any, delta: Any) -> State:
        opt_state: Any = tx.init(params)
        if delta is not None:
            opt_state = om.with_delta(opt_state, delta)
        state = {"params": params, "opt_state": opt_state}
        state |= {"step": jnp.zeros([], jnp.int32), "skipped": no_skips()}
        state |= {} if averages is None else averages.init(params)
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
    microbatches: int = 1,
    averages: ParameterAverages | None = None,
    reference_columns: Callable[[Any, Batch], Batch] | None = None,
    alpha_scale: Callable[[Metrics], jax.Array] | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[..., tuple[State, Metrics]]:
    """The jitted `step(state, batch, frozen={}, models={}) -> (state, metrics)`.

    It consumes the state. `frozen` holds the parameters that are not trained, `models` what the
    optimizer's update is given besides (`reference_params`, `base_params`). A step whose loss or
    gradient is not finite changes nothing but counters. The metrics are float32 scalars: `loss`,
    `grad_norm` (before any clipping), those of `loss_fn`, `merge/<name>` of
    `omerge_jax.merge_metrics`, and those of `train.training.finite`.

    Args:
      loss_fn: `loss_fn(params, batch) -> (loss, metrics)`, or a
        `train.objectives.accumulate.BatchLoss`; its batch also holds `step`, the updates done.
      tx: The optimizer `state` was made with.
      shardings: The places of the new state, from `state_shardings`, so that it keeps its layout.
      microbatches: Number of parts of a batch that are processed one after the other.
      averages: The averages that `init_state` was given.
      reference_columns: `f(params, batch)`: columns that come from the reference of the state.
      alpha_scale: What the weight of the reference is multiplied by, from the metrics of `loss_fn`.
      compiler_options: Options of `jax.jit`, see `train.distributed.mesh.compiler_options`.
    """
    tx = optax.with_extra_args_support(tx)

    def step(
        state: State, batch: Batch, frozen: Any = None, models: Mapping[str, Any] | None = None
    ) -> tuple[State, Metrics]:
        frozen = frozen or {}
        batch = {**batch, "step": state["step"]}  # for losses whose settings change with it
        if "reference" in state and reference_columns is not None:
            reference = join(state["reference"], frozen)
            known = columns_in_microbatches(reference_columns, reference, batch, microbatches)
            batch |= jax.lax.stop_gradient(known)
        of_trained = with_frozen(loss_fn, frozen) if frozen else loss_fn
        (loss, metrics), grads = loss_and_gradient(of_trained, microbatches)(state["params"], batch)
        extra = dict(models or {})
        if alpha_scale is not None:
            extra["alpha_scale"] = alpha_scale(metrics)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"], **extra)
        params, count = optax.apply_updates(state["params"], updates), state["step"] + 1
        new_state = {"params": params, "opt_state": opt_state, "step": count}
        new_state |= {} if averages is None else averages.update(state, params, count)
        grad_norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        new_state, skips = keep_if_not_finite(loss, grad_norm, new_state, state)
        merge = {f"merge/{name}": value for name, value in om.merge_metrics(opt_state).items()}
        metrics = {"loss": loss, "grad_norm": grad_norm, **metrics, **merge, **skips}
        return new_state, jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), metrics)

    places = None if shardings is None else (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=places, compiler_options=compiler_options)
