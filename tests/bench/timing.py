"""Times of optimizer steps, as ratios: pairs of steps in turns, because machines drift."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import omerge_jax as om
from tests.bench.cases import (
    TIES_DENSITY,
    Case,
    cases,
    initial_state,
    layer_axes,
    make_step,
    random_tree,
)

_WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Steps of an optimizer next to steps of a baseline.

    Attributes:
      milliseconds: median of the optimizer's step.
      baseline_milliseconds: median of the baseline's.
      ratio: median of the ratios pair by pair.
      ratio_low: first quartile of the ratios.
      ratio_high: third quartile of the ratios.
    """

    milliseconds: float
    baseline_milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


def compare(baseline: Callable[[], object], other: Callable[[], object], rounds: int) -> Comparison:
    """Times two steps in turns, at least twice each."""
    pairs = [(_seconds(baseline), _seconds(other)) for _ in range(max(2, rounds))]
    ratios = [b / a for a, b in pairs]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Comparison(
        milliseconds=1e3 * statistics.median(b for _, b in pairs),
        baseline_milliseconds=1e3 * statistics.median(a for a, _ in pairs),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
    )


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Data:
    """The arrays that all optimizers are given, on the default device.

    Gradients differ from step to step: from equal ones Adam makes updates that nearly all tie.
    """

    def __init__(self, shapes: Any):
        self.params = jax.tree.map(jnp.asarray, random_tree(shapes, 0.02, 0))
        self.delta = jax.tree.map(jnp.asarray, random_tree(shapes, 1e-3, 1))
        self.grads = [
            jax.tree.map(jnp.asarray, random_tree(shapes, 1e-3, seed)) for seed in (2, 3, 4)
        ]

    def extra(self, case: Case) -> dict[str, Any]:
        """Returns the further arguments of ``update``."""
        if case.delta != "recompute":
            return {}
        base = jax.tree.map(jnp.subtract, self.params, self.delta)
        return {"reference_params": _copy(self.params), "base_params": base}


class Stepper:
    """An optimizer with its arrays; a call takes a step and waits for it."""

    def __init__(self, case: Case, data: Data):
        held = jnp.bfloat16 if case.delta == "bfloat16" else jnp.float32
        delta = jax.tree.map(lambda x: x.astype(held), data.delta)
        self.params = _copy(data.params)
        self.opt_state = initial_state(case, self.params, delta)
        self.extra = data.extra(case)
        self.grads = itertools.cycle(data.grads)
        self.step = jax.jit(make_step(case), donate_argnums=(0, 1))
        for _ in range(_WARM_UP):
            self()

    def __call__(self) -> None:
        """Takes a step."""
        grads = next(self.grads)
        self.params, self.opt_state = self.step(self.params, self.opt_state, grads, self.extra)
        jax.block_until_ready((self.params, self.opt_state))


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def time_steps(
    shapes: Any, rounds: int, device: Any, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Times every optimizer on a device next to ``optax.adamw``.

    Args:
      shapes: tree of the parameters' shapes.
      rounds: pairs of steps.
      device: the device to time on.
      say: is given the name of every optimizer before it is timed.

    Returns:
      A row per optimizer.
    """
    usable = [c for c in cases() if device.platform != "cpu" or not c.on_accelerators]
    rows = []
    with jax.default_device(device):
        data = Data(shapes)
        baseline = Stepper(usable[0], data)
        for case in usable:
            say(case.name)
            # Next to another copy of itself the baseline shows how far ratios can be trusted.
            comparison = compare(baseline, Stepper(case, data), rounds)
            rows.append({"optimizer": case.name, **dataclasses.asdict(comparison)})
    return rows


def sampled_share(shapes: Any, steps: int = 4) -> dict[str, float]:
    """Measures which share of the updates a sampled threshold keeps.

    Args:
      shapes: tree of the parameters' shapes.
      steps: steps of the optimizer; from the second on, updates differ in magnitude.

    Returns:
      The wanted share, the share kept of all entries, and the largest relative deviation of any leaf
      at any of the later steps.
    """
    # Without a reference the merge emits F(Δθ), whose entries are then counted.
    keep = om.on_ties(0, density=TIES_DENSITY, threshold="sampled", layer_axes=layer_axes)
    tx: Any = om.fused_chain(optax.adamw(1e-6), keep)
    data = Data(shapes)
    state = tx.init(data.params)
    update = jax.jit(tx.update)
    shares: list[float] = []
    worst = 0.0
    for step in range(steps):
        updates, state = update(data.grads[step % len(data.grads)], state, data.params)
        if not step:
            continue
        kept = [(int(jnp.count_nonzero(leaf)), leaf.size) for leaf in jax.tree.leaves(updates)]
        shares.append(sum(n for n, _ in kept) / sum(size for _, size in kept))
        # A tensor of a few entries keeps a whole number of them.
        wanted = [(n, max(1, int(TIES_DENSITY * size))) for n, size in kept]
        worst = max(worst, *(abs(n / k - 1) for n, k in wanted))
    return {"wanted": TIES_DENSITY, "kept": statistics.mean(shares), "worst_deviation": worst}
