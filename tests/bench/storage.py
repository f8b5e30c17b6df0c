"""Bytes that each way of holding the delta takes, and its effect on the parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import omerge_jax as om
from tests.bench.cases import count, layer_axes, random_tree

_STEPS = 4
# Large enough for the reference term to be seen in float32 parameters.
_ALPHA = 0.1
PINNED = "pinned_host, bf16"


@dataclasses.dataclass(frozen=True)
class Held:
    """A way of holding the delta.

    Attributes:
      name: name in the table.
      storage: argument of the merge.
      dtype: dtype of the delta.
      densities: densities at which it is measured.
    """

    name: str
    storage: Any
    dtype: Any
    densities: tuple[float, ...] = (0.1,)


WAYS = (
    Held("dense, f32", "dense", jnp.float32, (0.01, 0.1)),
    Held("dense, bf16", "dense", jnp.bfloat16),
    Held("sparse, f32", "sparse", jnp.float32, (0.01, 0.1)),
    Held("sparse, bf16", "sparse", jnp.bfloat16, (0.01, 0.1)),
    Held(PINNED, "pinned_host", jnp.bfloat16),
    Held("recompute, f32", "recompute", jnp.float32),
)


def _merges(density: float, storage: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"storage": storage, "rounding": "nearest"}
    ties = om.on_ties(_ALPHA, density=density, layer_axes=layer_axes, **common)
    dare = om.on_dare(_ALPHA, density=density, delta_mask="fixed", **common)
    return {"on_dare, fixed": dare, "on_ties": ties}


def state_bytes(merge: Any, shapes: Any, dtype: Any) -> int:
    """Returns the bytes of the delta in the state of a merge."""

    def init(params: Any, delta: Any) -> Any:
        state = merge.init(params)
        holds_none = isinstance(state.reference_delta, optax.EmptyState)
        return state if holds_none else om.with_delta(state, delta)

    delta = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), shapes)
    state = jax.eval_shape(init, shapes, delta)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.reference_delta))


def trajectory(merge: Any, way: Held, shapes: Any, scale: float = 1.0) -> Any:
    """Returns the parameters after a few steps with a delta of ``scale`` times the usual one."""
    tx: Any = optax.with_extra_args_support(optax.chain(optax.adamw(1e-4), merge))
    params, delta = _tree(shapes, 0.02, 0), _tree(shapes, 1e-3, 1)
    base = jax.tree.map(lambda p, d: p - scale * d, params, delta)
    state = tx.init(params)
    extra = {"reference_params": params, "base_params": base}
    if way.storage != "recompute":
        extra = {}
        # A delta of zeros is refused outside of jit; it is meant here.
        set_delta = om.with_delta if scale else jax.jit(om.with_delta)
        state = set_delta(state, om.task_vector(params, base, dtype=way.dtype))

    @jax.jit
    def step(params: Any, state: Any, grads: Any, extra: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for seed in range(2, 2 + _STEPS):
        params, state = step(params, state, _tree(shapes, 1e-3, seed), extra)
    return params


def _tree(shapes: Any, scale: float, seed: int) -> Any:
    return jax.tree.map(jnp.asarray, random_tree(shapes, scale, seed))


def distances(one: Any, other: Any) -> tuple[float, float]:
    """Returns the largest difference of two trees' entries, and the root mean square."""
    gaps = jax.tree.map(lambda a, b: jnp.ravel(a - b), one, other)
    gaps = jnp.concatenate(jax.tree.leaves(gaps))
    return float(jnp.max(jnp.abs(gaps))), float(jnp.sqrt(jnp.mean(jnp.square(gaps))))


def storage_rows(size_shapes: Any, run_shapes: Any) -> list[dict[str, Any]]:
    """Measures every way of holding a delta.

    Args:
      size_shapes: shapes that bytes are counted for; no array is made.
      run_shapes: shapes that steps are taken with, on the default device.

    Returns:
      A row per merge, way and density. ``difference`` is how far the parameters are after a few steps
      from those of a dense float32 delta, by the largest entry, over the largest that the delta made;
      ``rms_difference`` likewise by root mean squares. A rounded delta may keep another entry in
      place of one of about the same magnitude, which moves single entries by all of their term. None
      where the storage needs an accelerator and there is none.
    """
    rows = []
    for density in (0.01, 0.1):
        for name, plain in _merges(density, "dense").items():
            expected = trajectory(plain, WAYS[0], run_shapes)
            moved = distances(expected, trajectory(plain, WAYS[0], run_shapes, scale=0.0))
            for way in (w for w in WAYS if density in w.densities):
                merge = _merges(density, way.storage)[name]
                row = {"optimizer": name, "density": density, "storage": way.name}
                row |= {"difference": None, "rms_difference": None}
                if way.name != PINNED or jax.default_backend() != "cpu":
                    gaps = distances(expected, trajectory(merge, way, run_shapes))
                    row["difference"], row["rms_difference"] = (
                        gap / move for gap, move in zip(gaps, moved, strict=True)
                    )
                rows.append(row | _held_bytes(merge, way, size_shapes))
    return rows


def _held_bytes(merge: Any, way: Held, shapes: Any) -> dict[str, float | None]:
    """Returns bytes per parameter; what a host's memory takes is the TPU compiler's to say."""
    if way.name == PINNED:
        return {"device_bytes": None, "host_bytes": None}
    return {
        "device_bytes": state_bytes(merge, shapes, way.dtype) / count(shapes),
        "host_bytes": 0.0,
    }


def fill_pinned(rows: list[dict[str, Any]], pinned: dict[str, Any], plain: dict[str, Any]) -> None:
    """Sets the bytes of the host's memory from the compiler's figures.

    Args:
      rows: rows from `storage_rows`; changed in place.
      pinned: figures of a step with the delta in the host's memory.
      plain: figures of a step without a merge.
    """
    on_device = (pinned["argument_bytes"] - plain["argument_bytes"]) / pinned["parameters"]
    on_host = pinned["host_argument_bytes"] / pinned["parameters"]
    for row in rows:
        if row["storage"] == PINNED:
            # Rounded: the few scalars of the merge are no part of the delta.
            row.update(device_bytes=round(on_device, 3), host_bytes=round(on_host, 3))
