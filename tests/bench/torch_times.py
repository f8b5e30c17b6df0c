"""Times of the published algorithm next to torch's fused AdamW."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import torch

from tests.bench import authors
from tests.bench.cases import layer_axes, random_tree
from tests.bench.timing import compare

BASELINE = "torch AdamW, fused"
DARE = "published OnDARE p=0.01"
TIES = "published OnTIES p=0.1"


def _tensors(shapes: Any, scale: float, seed: int, device: str) -> list[torch.Tensor]:
    """Returns random tensors, one per layer where layers are stacked, as in a torch model."""
    leaves = jax.tree_util.tree_flatten_with_path(random_tree(shapes, scale, seed))[0]
    tensors = []
    for path, leaf in leaves:
        tensor = torch.from_numpy(leaf)
        tensors += tensor.unbind() if layer_axes((path[0].key,)) else [tensor]
    return [tensor.to(device, copy=True) for tensor in tensors]


class Setting:
    """Optimizers over the same shapes and gradients."""

    def __init__(self, shapes: Any, device: str):
        self.shapes, self.device = shapes, device
        self.grads = [_tensors(shapes, 1e-3, seed, device) for seed in (2, 3, 4)]

    def _stepper(self, make: Callable[[list[torch.Tensor]], Any]) -> Callable[[], None]:
        params = _tensors(self.shapes, 0.02, 0, self.device)
        grads: Iterator[list[torch.Tensor]] = itertools.cycle(self.grads)
        optimizer = make(params)

        def step() -> None:
            for param, grad in zip(params, next(grads), strict=True):
                param.grad = grad
            optimizer.step()
            if self.device == "cuda":
                torch.cuda.synchronize()

        step()
        return step

    def baseline(self) -> Callable[[], None]:
        """Returns a step of torch's own AdamW."""
        return self._stepper(lambda params: torch.optim.AdamW(params, lr=1e-6, fused=True))

    def published(
        self, sparsify: authors.Sparsify, consensus: authors.Consensus, clip: float | None
    ) -> Callable[[], None]:
        """Returns a step of the published algorithm."""
        deltas = _tensors(self.shapes, 1e-3, 1, self.device)
        return self._stepper(
            lambda params: authors.OnlineMergingAdam(
                params, deltas, sparsify, consensus, lr=1e-6, clip=clip
            )
        )


def sees(device: str) -> bool:
    """Says whether torch can use the device, cpu or cuda."""
    return device == "cpu" or torch.cuda.is_available()


def time_published(
    shapes: Any, rounds: int, threads: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Times the published algorithm in pairs with torch's fused AdamW.

    Args:
      shapes: tree of the parameters' shapes.
      rounds: pairs of steps.
      threads: number of torch's threads.
      device: torch's name of the device.

    Returns:
      A row per optimizer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    setting = Setting(shapes, device)
    baseline = setting.baseline()
    others = {
        BASELINE: setting.baseline,
        DARE: lambda: setting.published(authors.dropout(0.01), authors.linear(5e-7), 1.0),
        TIES: lambda: setting.published(authors.top_k(0.1), authors.majority_sign(5e-7), None),
    }
    rows = []
    for name, make in others.items():
        comparison = compare(baseline, make(), rounds)
        rows.append({"optimizer": name, **dataclasses.asdict(comparison)})
    torch.set_num_threads(before)
    return rows
