"""Every transformation of the library, as several test modules make them."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om
from omerge_jax.online import EVERY_STEP
from omerge_jax.state import merge_states

ALPHA, DENSITY, RATE = 0.1, 0.5, 1e-2


class Case(NamedTuple):
    """A transformation: its factory, and the arguments that it is made with."""

    factory: Callable[..., Any]
    options: dict[str, Any]

    def make(self, **options: Any) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(self.factory(**(self.options | options)))


BOTH = {"alpha": ALPHA, "density": DENSITY}


def merging(sparsifier: Any, consensus: Any, **options: Any) -> Case:
    parts = {"sparsifier": sparsifier, "consensus": consensus, "alpha": ALPHA}
    return Case(om.online_merge, parts | options)


def opposing(rate: Any, delta: Any = None) -> Any:
    """The gated anchor, with a delta like the one that `start` sets."""
    return om.anchored(rate, gate="opposing", delta=tree(1) if delta is None else delta)


def fused(alpha: Any, density: Any, every_k: int = EVERY_STEP) -> Any:
    return om.fused_chain(
        optax.sgd(RATE, momentum=0.9), om.on_ties(alpha=alpha, density=density, every_k=every_k)
    )


MERGES = {
    "on_dare": Case(om.on_dare, BOTH),
    "on_dare fixed norm": Case(om.on_dare, BOTH | {"delta_mask": "fixed", "rescale": "norm"}),
    "on_ties": Case(om.on_ties, BOTH),
    "on_ties norm weighted": Case(om.on_ties, BOTH | {"rescale": "norm", "election": "weighted"}),
    "on_ties measured": Case(om.on_ties, BOTH | {"diagnostics": True}),
    "on_ties sampled": Case(om.on_ties, BOTH | {"threshold": "sampled"}),
    "on_ties relative": Case(om.on_ties, BOTH | {"alpha": om.relative(0.2)}),
    "identity": merging(om.identity(), om.linear()),
    "band": merging(om.band(DENSITY, gamma=0.1), om.linear()),
    "band fixed norm": merging(
        om.band(DENSITY, gamma=0.1, rescale="norm"), om.sign(), delta_mask="fixed"
    ),
    "ranked": merging(om.magnitude_ranked(DENSITY), om.sign("weighted")),
    "child_tuning": Case(om.child_tuning, {"density": DENSITY}),
    "keep_largest": Case(om.keep_largest, {"density": DENSITY}),
}
OPTIMIZERS = {
    "on_dare_adamw": Case(om.on_dare_adamw, BOTH | {"learning_rate": RATE, "weight_decay": 0.1}),
    "on_ties_adamw": Case(om.on_ties_adamw, BOTH | {"learning_rate": RATE, "weight_decay": 0.1}),
    "fused_chain": Case(fused, BOTH),
}
OTHERS = {
    "rounded": Case(om.rounded, {"how": "stochastic"}),
    "rounded compensated": Case(om.rounded, {"how": "compensated"}),
    "anchored": Case(om.anchored, {"rate": ALPHA}),
    "anchored opposing": Case(opposing, {"rate": ALPHA}),
}
ALL = MERGES | OPTIMIZERS | OTHERS
# Other settings of merges that are in the short tests too; they are run with the slow ones.
VARIANTS = {
    "on_dare fixed norm",
    "on_ties norm weighted",
    "on_ties measured",
    "on_ties sampled",
    "on_ties relative",
    "band fixed norm",
}


def marks(name: str) -> Any:
    """The marks of the case of a name in the tests that run over all: variants are slow."""
    return pytest.mark.slow if name in VARIANTS else ()


def named(names: Iterable[str]) -> list[Any]:
    """Names of cases as parameters of a test."""
    return [pytest.param(name, marks=marks(name)) for name in names]


# Sparsifiers by density. `random` with rescale="norm" stands apart: it is not homogeneous, as it adds
# 1e-6 to a norm, as the authors' code does.
SPARSIFIERS = {
    "identity": lambda density: om.identity(),
    "random": lambda density: om.random(density, clip=None),
    "random_unscaled": lambda density: om.random(density, rescale="none", clip=None),
    "magnitude": lambda density: om.magnitude(density),
    "magnitude_norm": lambda density: om.magnitude(density, rescale="norm"),
    "band": lambda density: om.band(density, gamma=0.1),
    "band_norm": lambda density: om.band(density, gamma=0.1, rescale="norm"),
    "ranked": lambda density: om.magnitude_ranked(density, epsilon=0.1),
    "ranked_norm": lambda density: om.magnitude_ranked(density, epsilon=0.1, rescale="norm"),
}
RANDOM_NORM = {"random_norm": lambda density: om.random(density, rescale="norm", clip=None)}


def tree(seed: int, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {"block": {"kernel": (8, 6), "bias": (6,)}, "scale": ()}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: type(s) is tuple
    )


def start(tx: Any, params: Any, delta: Any = None) -> Any:
    """The state at step 0, with a reference delta where there is a merge."""
    state = tx.init(params)
    return (
        om.with_delta(state, tree(1) if delta is None else delta) if merge_states(state) else state
    )
