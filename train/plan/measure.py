"""Compiles the step of a configuration for a machine and takes the compiler's figures."""

from __future__ import annotations

import math
import re
from typing import Any

import jax

from train.config import DPOConfig, OptimizerOptions, UserError
from train.distributed.mesh import on_mesh
from train.models import ModelConfig
from train.models.hf_names import decoder_leaves
from train.plan.arithmetic import estimate, model_flops, temporaries
from train.plan.cost import program_cost
from train.plan.figures import Memory, Plan, State, Work
from train.plan.program import Program, make_program
from train.plan.target import Target

_REFUSED = (
    re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"),
)
"""The compiler's messages for a program that does not fit: its temporaries, or all it needs."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make_plan(config: DPOConfig, model: ModelConfig, target: Target) -> Plan:
    """The figures of a step, from the compiler where the target has one and the state fits.

    Raises `UserError` for a field that cannot be used on the target.
    """
    _check_platform(config, target)
    mesh = target.mesh(config.mesh)
    program = make_program(config, model, mesh)
    state = state_bytes(program)
    if target.devices and target.hbm is not None and state.total > target.hbm:
        source, work = "state", None
        memory = Memory(state, 0.0, temporaries(config, model, mesh, state))
    elif target.devices:
        source = "compiler"
        memory, work = _compiled(program, state, mesh, target)
    else:
        source = "arithmetic"
        node = target.peaks.node if target.peaks else 0
        memory, work = estimate(config, model, mesh, state, node)
    return Plan(
        target=target,
        mesh=dict(mesh.shape),
        source=source,
        parameters=sum(math.prod(leaf.shape) for leaf in decoder_leaves(model).values()),
        model_flops=model_flops(config, model),
        memory=memory,
        work=work,
    )


def _check_platform(config: DPOConfig, target: Target) -> None:
    """Refuses a kind of attention, or a delta in the host's memory, that the target does not have."""
    kind = config.model.attention
    runs_on = {"xla": ("cpu", "tpu", "gpu"), "splash": ("tpu",), "cudnn": ("gpu",)}[kind]
    platform = target.devices[0].platform if target.devices else "gpu"
    if platform not in runs_on:
        raise UserError(
            f"model.attention is {kind}, which cannot be compiled for {target.topology}; use xla."
        )

    if config.optimizer.delta_storage == "pinned_host" and platform == "cpu":
        raise UserError(
            "optimizer.storage is pinned_host, which is for accelerators, and topology is "
            f"{target.topology}; use dense or sparse."
        )


def without_merge(options: OptimizerOptions) -> OptimizerOptions | None:
    """The optimizer that a merging one is built on, or None where it has no name of its own."""
    name = options.inner_name
    if options.delta_storage is None or name not in ("adamw", "lion"):
        return None
    kept = ("learning_rate", "b1", "b2", "eps", "weight_decay", "max_grad_norm", "moment_dtype")
    return OptimizerOptions(name=name, **{field: getattr(options, field) for field in kept})


def state_bytes(program: Program) -> State:
    """Bytes of a chip's part of the state and of a batch, by shapes and places."""
    sizes = {"parameters": 0.0, "optimizer": 0.0, "delta": 0.0, "on_host": 0.0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.state):
        on_host = leaf.sharding is not None and leaf.sharding.memory_kind == "pinned_host"
        sizes["on_host" if on_host else _kind(path)] += part_bytes(leaf)
    sizes["delta"] += sum(part_bytes(leaf) for leaf in jax.tree.leaves(program.models))
    batch = sum(part_bytes(leaf) for leaf in jax.tree.leaves(program.batch))
    return State(**sizes, batch=batch)


_OF_DELTA = ("reference_delta", "delta_fit", "merged_params", "rounding_state", "merge_scalars")


def _kind(path: tuple[Any, ...]) -> str:
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if names[0] == "params":
        return "parameters"
    return "delta" if set(names) & set(_OF_DELTA) else "optimizer"


def part_bytes(leaf: jax.ShapeDtypeStruct) -> float:
    """Bytes of what one device holds of an array."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _compiled(
    program: Program, state: State, mesh: Any, target: Target
) -> tuple[Memory, Work | None]:
    try:
        with on_mesh(mesh):
            compiled: Any = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        temporaries = refused_temporaries(str(error), state)
        if temporaries is None:
            raise
        return Memory(state, 0.0, temporaries), None
    memory = compiled.memory_analysis()
    new = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    slices = target.slices
    cost = program_cost(compiled.as_text(), mesh.size // slices, slices=slices)
    unknown = len(cost.loops), len(cost.kernels)
    return (
        Memory(
            state,
            # Columns that the step does not read are no arguments.
            padding=max(0.0, memory.argument_size_in_bytes - state.total),
            temporaries=memory.temp_size_in_bytes + new,
            program=memory.generated_code_size_in_bytes,
        ),
        Work(cost.flops, cost.hbm_bytes, dict(cost.sent), dict(cost.network), *unknown),
    )


def refused_temporaries(message: str, state: State) -> float | None:
    """Bytes of temporaries that a compiler names when it refuses a program, or None where it does not.

    Example:
        >>> held = State(parameters=1e9, optimizer=0.0, delta=0.0, batch=0.0)
        >>> refused_temporaries("required for HLO temporaries (2.00G) exceeds available HBM", held)
        2147483648.0
    """
    for pattern, held in zip(_REFUSED, (0.0, state.total), strict=True):
        found = pattern.search(message)
        if found:
            return max(0.0, float(found[1]) * _UNITS[found[2]] - held)
    return None
