"""The published algorithm in torch, the way its authors' code does it.

Every tensor on its own, in place, with a dense float32 delta; Adam with its epsilon beside the
uncorrected second moment, and weight decay after the merge. See arXiv 2405.17931.
"""

from collections.abc import Callable, Sequence

import torch

Sparsify = Callable[[torch.Tensor], torch.Tensor]
Consensus = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dropout(density: float) -> Sparsify:
    """Keeps each entry with probability ``density`` and divides it by that (OnDARE)."""
    return lambda x: torch.nn.functional.dropout(x, 1 - density)


def top_k(density: float) -> Sparsify:
    """Keeps the largest entries by magnitude (OnTIES)."""

    def sparsify(x: torch.Tensor) -> torch.Tensor:
        kept = int(density * x.numel())
        if not 1 <= kept < x.numel():
            return x
        magnitude = x.abs()
        edge = magnitude.flatten().kthvalue(x.numel() - kept + 1).values
        return x * (magnitude >= edge)

    return sparsify


def linear(alpha: float) -> Consensus:
    """Blends update and delta."""
    return lambda update, delta: (1 - alpha) * update + alpha * delta


def majority_sign(alpha: float) -> Consensus:
    """Blends the entries that have the sign of the plain sum of both; zero counts as positive."""

    def merge(update: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        positive = update + delta >= 0
        ours = torch.where((update >= 0) == positive, update, 0)
        theirs = torch.where((delta >= 0) == positive, delta, 0)
        return (1 - alpha) * ours + alpha * theirs

    return merge


class OnlineMergingAdam:
    """Adam whose updates are merged with a fixed, sparsified delta.

    Args:
      params: the parameters, with their gradients in ``grad``; changed in place.
      deltas: τ_r of each parameter.
      sparsify: the sparsifier F, applied to every update, and to the deltas once.
      consensus: the consensus ⊕ of update and delta.
      lr: learning rate.
      weight_decay: decoupled weight decay, applied after the merge.
      clip: largest magnitude of an entry of the sparsified delta.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        sparsify: Sparsify,
        consensus: Consensus,
        *,
        lr: float,
        weight_decay: float = 0.0,
        clip: float | None = None,
    ):
        self.params = params
        self.deltas = [sparsify(delta) for delta in deltas]
        if clip is not None:
            self.deltas = [delta.clamp(-clip, clip) for delta in self.deltas]
        self.sparsify, self.consensus = sparsify, consensus
        self.lr, self.weight_decay = lr, weight_decay
        self.beta1, self.beta2, self.eps = 0.9, 0.999, 1e-6
        self.first = [torch.zeros_like(p) for p in params]
        self.second = [torch.zeros_like(p) for p in params]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Takes one step."""
        self.steps += 1
        size = self.lr * (1 - self.beta2**self.steps) ** 0.5 / (1 - self.beta1**self.steps)
        moments = zip(self.first, self.second, strict=True)
        for param, delta, (first, second) in zip(self.params, self.deltas, moments, strict=True):
            assert param.grad is not None
            first.mul_(self.beta1).add_(param.grad, alpha=1 - self.beta1)
            second.mul_(self.beta2).addcmul_(param.grad, param.grad, value=1 - self.beta2)
            update = (first / second.sqrt().add_(self.eps)).mul_(-size)
            param.add_(self.consensus(self.sparsify(update), delta))
            if self.weight_decay:
                param.add_(param, alpha=-self.lr * self.weight_decay)
