"""Settings of ``python -m train merge``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import ranges
from train.config.base import DType

MergeMethod = Literal[
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della_linear",
    "della",
    "breadcrumbs",
    "breadcrumbs_ties",
    "slerp",
]


@dataclass(frozen=True, kw_only=True)
class MergeModelOptions:
    """One model that goes into a merge.

    Attributes:
        path: Directory in Hugging Face format, or a hub name.
        weight: Its weight; every method but slerp needs one.
        density: Share of the entries of its delta that is kept. Unset: 1.
        epsilon: della: half the width of the window of probabilities. Unset: 0.15.
        gamma: breadcrumbs: share of the largest entries dropped. Unset: 0.01.
    """

    path: str
    weight: float | None = None
    density: ranges.Share | None = None
    epsilon: ranges.NonNegativeFloat | None = None
    gamma: ranges.BelowOne | None = None


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """One-shot merge of models in Hugging Face format, one tensor at a time.

    The result of AdamW plus λ times the delta of the SFT model is ``task_arithmetic`` of both, with
    weights 1 and λ.

    Attributes:
        method: How tensors are merged; see `omerge_jax.offline_merge`.
        models: The models. Configuration, tokenizer and chat template come from the first.
        output: Directory to write; it must be absent or empty.
        base: The model that deltas are taken from, and the start of slerp. Only linear does without.
        dtype: Type of the merged weights. Unset: as stored in `base`, or in the first model.
        scale: Factor of the merged delta (mergekit's lambda). Unset: 1.
        normalize: Divide by the sum of the weights. Unset: as mergekit does for the method.
        rescale: What makes up for dropped entries. Unset: as mergekit does for the method.
        election: How signs are elected. Unset: weighted.
        t: slerp: share of the way from `base` (0) to the model (1).
        seed: Seed of random masks. Unset: 0.
        max_shard_size: Bytes per safetensors file.
    """

    method: MergeMethod
    models: list[MergeModelOptions]
    output: str
    base: str | None = None
    dtype: DType | None = None
    scale: float | None = None
    normalize: bool | None = None
    rescale: Literal["inverse", "norm", "none"] | None = None
    election: Literal["weighted", "unweighted", "count"] | None = None
    t: ranges.ClosedUnitInterval | None = None
    seed: ranges.Seed | None = None
    max_shard_size: ranges.PositiveInt = 5_000_000_000
