"""Figures of the TPU compiler for one optimizer step, compiled ahead of time without a TPU."""

import concurrent.futures
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import omerge_jax as om
from tests.bench.cases import (
    PINNED,
    TIES_DENSITY,
    Case,
    count,
    initial_state,
    layer_axes,
    make_step,
)

# The compiler counts the body of a loop once. A large leaf has one; a sample has one for magnitudes
# and one for ties.
_LOOPS = {"exact": 1, "sampled": 2}


def make_mesh(topology: str) -> Mesh:
    """Returns a mesh of one axis over the chips of a topology such as ``v5p:2x2x1``."""
    chips = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    return Mesh(np.array(chips).reshape(-1), ("fsdp",))


class Placement:
    """Abstract arrays sharded on their last axis over a mesh, for a step to be compiled with."""

    def __init__(self, mesh: Mesh, shapes: Any):
        self.mesh = mesh
        self.params = jax.tree.map(self.place, shapes)

    def place(self, x: Any, dtype: Any = None, memory: str = "device") -> jax.ShapeDtypeStruct:
        """Returns the shape with its sharding."""
        spec = PartitionSpec(*([None] * (x.ndim - 1) + ["fsdp"] if x.ndim > 1 else []))
        sharding = NamedSharding(self.mesh, spec, memory_kind=memory)
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    def opt_state(self, case: Case) -> Any:
        """Returns the state of a case."""
        held = jnp.bfloat16 if case.delta == "bfloat16" else jnp.float32
        delta = jax.tree.map(lambda x: self.place(x, held), self.params)
        state = jax.eval_shape(lambda p, d: initial_state(case, p, d), self.params, delta)
        memory = "pinned_host" if case.name == PINNED else "device"

        def place(node: Any) -> Any:
            if not isinstance(node, om.OnlineMergeState):
                return self.place(node)
            held = jax.tree.map(lambda x: self.place(x, memory=memory), node.reference_delta)
            placed = jax.tree.map(self.place, node._replace(reference_delta=None))
            return placed._replace(reference_delta=held)

        return jax.tree.map(place, state, is_leaf=_is_merge)

    def extra(self, case: Case) -> dict[str, Any]:
        """Returns the further arguments of ``update``."""
        models = ("reference_params", "base_params")
        return dict.fromkeys(models, self.params) if case.delta == "recompute" else {}


def _is_merge(node: Any) -> bool:
    return isinstance(node, om.OnlineMergeState)


def _compile(step: Callable[..., Any], placement: Placement, case: Case) -> Any:
    arguments = (placement.params, placement.opt_state(case), placement.params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(*arguments, placement.extra(case)).compile()


def step_figures(
    topology: str,
    shapes: Any,
    compared: list[Case],
    passes: dict[str, int],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Compiles a step of every case for a TPU topology.

    Args:
      topology: such as ``v5p:2x2x1``.
      shapes: tree of the parameters' shapes.
      compared: the cases, the baseline first.
      passes: from `search_passes`. The compiler counts the body of a loop once, so the others are
        added: each reads what it searches, in float32, or what that is computed from.
      say: is given the name of every case before it is compiled.

    Returns:
      A row per case with figures per chip. Ratios are to the first case.
    """
    placement = Placement(make_mesh(topology), shapes)

    def figures(case: Case) -> dict[str, Any]:
        say(case.name)
        return _figures(case, placement, passes)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(figures, compared))
    for row in rows:
        for name in ("bytes", "flops"):
            row[name + "_ratio"] = row[name] / rows[0][name]
    return rows


def _figures(case: Case, placement: Placement, passes: dict[str, int]) -> dict[str, Any]:
    step = make_step(case)
    compiled = _compile(step, placement, case)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    once = float(cost["bytes accessed"])
    searched = 4 * searched_entries(case, placement.params) / placement.mesh.size
    uncounted = 0
    if case.threshold is not None:
        more = max(0, passes[case.threshold] - _LOOPS[case.threshold])
        uncounted = more * case.arrays_per_pass
    return {
        "optimizer": case.name,
        "bytes": once + uncounted * searched,
        "bytes_loop_body_once": once,
        "flops": float(cost["flops"]),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "host_argument_bytes": memory.host_argument_size_in_bytes,
        "parameters": count(placement.params) / placement.mesh.size,
    }


def searched_entries(case: Case, shapes: Any) -> float:
    """Returns how many entries one pass of the search for a threshold reads."""
    if case.threshold is None:
        return 0.0
    sparsifier = om.magnitude(TIES_DENSITY, threshold=case.threshold)
    total = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        layers = layer_axes((path[0].key,))
        ctx = om.SparsifyContext(jnp.int32(0), (path[0].key,), "update", layers)
        sample = sparsifier.choose_sample(leaf.shape, ctx)
        total += leaf.size * (1.0 if sample is None else sample.width / sample.block)
    return total


def search_passes(entries: int, density: float, seed: int = 0) -> dict[str, int]:
    """Measures the passes over one tensor of normal entries, or over a sample of it.

    Args:
      entries: entries of the tensor.
      density: share kept.
      seed: seed of the entries.

    Returns:
      Passes of an ``"exact"`` and of a ``"sampled"`` threshold.
    """
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((entries // 256, 256), np.float32))
    ctx = om.SparsifyContext(jnp.int32(0), ("w",), "update")
    passes = {}
    for threshold in ("exact", "sampled"):
        keep: Any = om.magnitude(density, threshold=threshold)
        passes[threshold] = int(jax.jit(lambda x, keep=keep: keep.passes(x, ctx))(x))
    return passes


def train_step_figures(topology: str, shapes: Any, compared: list[Case]) -> list[dict[str, Any]]:
    """Compiles whole training steps: a small network's gradients, then the optimizer.

    What an optimizer needs between its operations may reuse what the backward pass has left.

    Args:
      topology: such as ``v5p:2x2x1``.
      shapes: tree of the parameters' shapes.
      compared: the cases, the baseline first.

    Returns:
      A row per case with the temporary bytes and the bytes accessed per chip.
    """
    placement = Placement(make_mesh(topology), shapes)
    batch = NamedSharding(placement.mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((4, 512), jnp.int32, sharding=batch)
    rows = []
    for case in compared:
        update = make_step(case)

        def step(params: Any, opt_state: Any, tokens: Any, update: Any = update) -> Any:
            return update(params, opt_state, jax.grad(_loss)(params, tokens), {})

        jitted = jax.jit(step, donate_argnums=(0, 1))
        compiled: Any = jitted.lower(placement.params, placement.opt_state(case), tokens).compile()
        rows.append(
            {
                "optimizer": case.name,
                "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "bytes_once": float(compiled.cost_analysis()["bytes accessed"]),
            }
        )
    return rows


def _loss(params: Any, tokens: jax.Array) -> jax.Array:
    def block(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        hidden = (x @ weight.astype(x.dtype))[..., :width]
        return x + jnp.tanh(hidden), None

    x = params["embed"][tokens].astype(jnp.bfloat16)
    x, _ = jax.lax.scan(jax.checkpoint(block), x, params["layers"]["up"])
    x = x * params["norm"].astype(x.dtype)
    logits = x @ params["embed"].T.astype(x.dtype)[:, :2048]
    return jnp.mean(jnp.square(logits.astype(jnp.float32)))


def leaf_bytes(shapes: Any, chips: int) -> float:
    """Returns the bytes per chip, in float32, of the smallest leaf that is a matrix or more."""
    return 4 * min(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1) / chips
