"""Online merging optimizers for JAX, as Optax gradient transformations.

Blend every optimizer update with the delta between a fine-tuned model and its pre-trained base, so
that alignment does not cost what the model already knew (https://arxiv.org/abs/2405.17931).
"""

from omerge_jax.alpha import Relative, relative
from omerge_jax.anchor import AnchoredState, anchored
from omerge_jax.consensus import Consensus, linear, sign
from omerge_jax.delta import task_vector
from omerge_jax.diagnostics import merge_metrics
from omerge_jax.fused import FusedChainState, fused_chain
from omerge_jax.methods import child_tuning, keep_largest, on_dare, on_ties
from omerge_jax.offline import offline_merge
from omerge_jax.online import online_merge
from omerge_jax.presets import on_dare_adamw, on_ties_adamw
from omerge_jax.rounding import RoundedState, rounded
from omerge_jax.sparsifiers.band import band
from omerge_jax.sparsifiers.base import FittedSparsifier, Sparsifier, SparsifyContext, identity
from omerge_jax.sparsifiers.magnitude import magnitude
from omerge_jax.sparsifiers.random import random
from omerge_jax.sparsifiers.ranked import magnitude_ranked
from omerge_jax.state import OnlineMergeState, with_delta

__version__ = "0.1.0"

__all__ = [
    "AnchoredState",
    "Consensus",
    "FittedSparsifier",
    "FusedChainState",
    "OnlineMergeState",
    "Relative",
    "RoundedState",
    "Sparsifier",
    "SparsifyContext",
    "anchored",
    "band",
    "child_tuning",
    "fused_chain",
    "identity",
    "keep_largest",
    "linear",
    "magnitude",
    "magnitude_ranked",
    "merge_metrics",
    "offline_merge",
    "on_dare",
    "on_dare_adamw",
    "on_ties",
    "on_ties_adamw",
    "online_merge",
    "random",
    "relative",
    "rounded",
    "sign",
    "task_vector",
    "with_delta",
]
