"""The optimizers that are compared, and the shapes they run on."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import omerge_jax as om

BASELINE = "optax.adamw"
DARE = "chain, on_dare p=0.01, bf16"
TIES_EXACT = "chain, on_ties exact p=0.1, bf16"
TIES_FUSED_EXACT = "fused_chain, on_ties exact p=0.1, bf16"
TIES_CHAINED = "chain, on_ties sampled p=0.1, bf16"
TIES_SAMPLED = "fused_chain, on_ties sampled p=0.1, bf16"
PINNED = "chain, on_dare p=0.01, pinned_host"

Delta = Literal["none", "float32", "bfloat16", "recompute"]
TIES_DENSITY = 0.1
_ALPHA = 5e-7
_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer to measure.

    Attributes:
      name: name in the tables.
      transformation: the optimizer.
      delta: dtype of the delta it is given; ``"recompute"`` where ``update`` takes both models,
        ``"none"`` where there is no merge.
      threshold: how an ``on_ties`` finds its threshold; None for other optimizers.
      arrays_per_pass: how many float32 arrays as large as the leaf a pass of the search reads: the
        update, or what it is computed from anew.
      on_accelerators: whether it needs a memory of the host's beside the device's.
    """

    name: str
    transformation: optax.GradientTransformation
    delta: Delta = "bfloat16"
    threshold: Literal["exact", "sampled"] | None = None
    arrays_per_pass: int = 1
    on_accelerators: bool = False


def layer_axes(path: tuple[str, ...]) -> int:
    """Says that the layers are stacked."""
    return int(path[0] == "layers")


def cases() -> list[Case]:
    """Returns everything that is compared, the baseline first."""
    return [Case(BASELINE, _adamw(), "none"), *_dare_cases(), *_ties_cases()]


def _adamw() -> optax.GradientTransformation:
    return optax.adamw(1e-6)


def _dare_cases() -> list[Case]:
    dare = functools.partial(om.on_dare, _ALPHA, density=0.01)
    measured = om.fused_chain(_adamw(), dare(diagnostics=True))
    return [
        Case(DARE, optax.chain(_adamw(), dare())),
        Case("chain, on_dare p=0.01, f32", optax.chain(_adamw(), dare()), "float32"),
        Case(
            "chain, on_dare p=0.01, fixed, sparse",
            optax.chain(_adamw(), dare(delta_mask="fixed", storage="sparse")),
        ),
        Case(
            "chain, on_dare p=0.01, recompute",
            optax.chain(_adamw(), dare(storage="recompute")),
            "recompute",
        ),
        Case(PINNED, optax.chain(_adamw(), dare(storage="pinned_host")), on_accelerators=True),
        Case("fused_chain, on_dare p=0.01, bf16, diagnostics", measured),
        Case("on_dare_adamw p=0.01, bf16", om.on_dare_adamw(1e-6, alpha=_ALPHA, density=0.01)),
    ]


def _ties_cases() -> list[Case]:
    ties = functools.partial(om.on_ties, _ALPHA, layer_axes=layer_axes)
    exact = functools.partial(ties, density=TIES_DENSITY)
    sampled = functools.partial(ties, density=TIES_DENSITY, threshold="sampled")
    preset = om.on_ties_adamw(
        1e-6, alpha=_ALPHA, density=TIES_DENSITY, threshold="sampled", layer_axes=layer_axes
    )

    def case(name: str, tx: optax.GradientTransformation, threshold: Any, **rest: Any) -> Case:
        return Case(name, tx, threshold=threshold, **rest)

    chain, fused = optax.chain, om.fused_chain
    return [
        case(TIES_EXACT, chain(_adamw(), exact()), "exact"),
        case(
            "chain, on_ties exact p=0.01, sparse",
            chain(_adamw(), ties(density=0.01, storage="sparse")),
            "exact",
        ),
        case(
            "chain, on_ties exact p=0.1, recompute",
            chain(_adamw(), exact(storage="recompute")),
            "exact",
            delta="recompute",
        ),
        # Gradients, two moments and parameters.
        case(TIES_FUSED_EXACT, fused(_adamw(), exact()), "exact", arrays_per_pass=4),
        case(TIES_CHAINED, chain(_adamw(), sampled()), "sampled"),
        case(TIES_SAMPLED, fused(_adamw(), sampled()), "sampled"),
        case(
            "fused_chain, on_ties sampled p=0.1, sparse",
            fused(_adamw(), sampled(storage="sparse")),
            "sampled",
        ),
        case(
            "fused_chain, on_ties sampled p=0.1, bf16, diagnostics",
            fused(_adamw(), sampled(diagnostics=True)),
            "sampled",
        ),
        case("on_ties_adamw sampled p=0.1, bf16", preset, "sampled"),
    ]


def parameter_shapes(millions: float) -> dict[str, Any]:
    """Shapes like a decoder's with about ``millions`` million parameters, float32."""
    width = max(64, int((millions * 1e6 / (_LAYERS * 4 + 16)) ** 0.5) // 32 * 32)
    return _shapes(16 * width, width, (_LAYERS, width, 4 * width))


def large_shapes() -> dict[str, Any]:
    """Shapes whose shards do not fit into a TPU core's own memory, as a large model's do not."""
    return _shapes(65536, 8192, (16, 8192, 8192))


def _shapes(vocabulary: int, width: int, up: tuple[int, int, int]) -> dict[str, Any]:
    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {"embed": leaf(vocabulary, width), "layers": {"up": leaf(*up)}, "norm": leaf(width)}


def random_tree(shapes: Any, scale: float, seed: int) -> Any:
    """Returns normal float32 arrays on the host of a standard deviation of ``scale``."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: np.float32(scale) * rng.standard_normal(s.shape, np.float32), shapes
    )


def count(shapes: Any) -> int:
    """Returns the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def initial_state(case: Case, params: Any, delta: Any) -> Any:
    """Returns the optimizer state of a case, with the delta in it where it holds one."""
    opt_state: Any = case.transformation.init(params)
    held = case.delta in ("float32", "bfloat16")
    return om.with_delta(opt_state, delta) if held else opt_state


def make_step(case: Case) -> Any:
    """Returns ``step(params, opt_state, grads, extra) -> (params, opt_state)``, not compiled."""
    tx = optax.with_extra_args_support(case.transformation)

    def step(params: Any, opt_state: Any, grads: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    return step
