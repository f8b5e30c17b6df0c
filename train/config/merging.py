"""Settings of ``python -m train merge``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    """One of the models to merge.

    Attributes:
        path: Directory in Hugging Face format, or a hub name.
        weight: Factor of the model, or of its difference from the base. All methods but slerp need
            it.
        density: Share of the entries of its difference from the base that is kept, in (0, 1].
            Unset: 1.
    """

    path: str
    weight: float | None = None
    density: float | None = None


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """A merge of models with one architecture and one vocabulary, without training.

    Attributes:
        models: The models. In flags: ``--models '[{path: a, weight: 0.5}, {path: b, weight: 0.5}]'``.
        output: Directory to write; it must be absent or empty.
        base: The model that the others are differences from; for slerp the one at t = 0. Every
            method but linear needs it, linear does not accept it.
        method: How to merge; `omerge_jax.offline_merge` has the formulas. The fields below are those
            of its arguments; unset they take the method's default, which is mergekit's, and one that
            a method does not use is an error.
        dtype: Type of the merged weights; the computation is in float32. Unset: tensor by tensor
            that of the base (linear: of the first model).
        like: Directory or hub name of the model whose config, tokenizer, chat template and generation
            settings the result gets. Unset: the first of `models`.
        normalize: Divide by the sum of the weights.
        rescale: After entries were dropped, what remains gets the L1 norm of the whole ("norm"), is
            divided by its probability ("inverse") or left alone ("none").
        election: How the signs are elected.
        epsilon: For della: half the width of the window of probabilities.
        gamma: For breadcrumbs: share of the largest entries dropped.
        scale: Factor of the merged difference, mergekit's lambda.
        t: For slerp: share of the way from the base to the model, in [0, 1].
        seed: Seed of the masks of dare and della.
        max_shard_size: Bytes per safetensors file; so much is held in memory before it is written.
    """

    models: list[MergeModelOptions]
    output: str
    base: str | None = None
    method: MergeMethod = "linear"
    dtype: DType | None = None
    like: str | None = None
    normalize: bool | None = None
    rescale: Literal["inverse", "norm", "none"] | None = None
    election: Literal["weighted", "unweighted", "count"] | None = None
    epsilon: float | None = None
    gamma: float | None = None
    scale: float | None = None
    t: float | None = None
    seed: int | None = None
    max_shard_size: int = 5_000_000_000
