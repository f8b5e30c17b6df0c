"""An elementwise optimizer and a merge, chained so that statistics cost no pass of their own."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from omerge_jax.numerics import sum_together
from omerge_jax.paths import Path, leaves_by_path, path_names
from omerge_jax.sample import Sample
from omerge_jax.state import merge_states
from omerge_jax.threshold import magnitude_bits

TakeSamples = Callable[[dict[Path, Sample]], dict[Path, jax.Array]]

# What moves values from entry to entry, or puts several of them together.
_MIXING = (
    "reduce",
    "arg",
    "cum",
    "dot_general",
    "conv_general",
    "sort",
    "top_k",
    "gather",
    "scatter",
    "transpose",
    "reshape",
    "rev",
    "slice",
    "dynamic_",
    "concatenate",
    "pad",
    "fft",
    "iota",
    "random_",
    "threefry",
    "cholesky",
    "qr",
    "svd",
    "eig",
    "while",
    "scan",
)
_SHAPELESS = ("reduce_precision",)


class FusedChainState(NamedTuple):
    """State of `fused_chain`.

    Attributes:
      inner_state: state of the optimizer.
      merge_state: state of the merge.
    """

    inner_state: Any
    merge_state: Any


def fused_chain(
    inner: optax.GradientTransformation, merge: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """``optax.chain(inner, merge)`` for an elementwise inner optimizer, with cheaper statistics.

    A sampled threshold and the metrics of a merge look at a small part of every update. In a plain
    chain the compiler computes the whole update first, writes it out and reads it again, because two
    things use it. Here the few entries are computed a second time from the same entries of the
    gradients, moments and parameters, so that the whole step stays one pass over memory and needs no
    temporary array.

    Args:
      inner: an optimizer whose update of an entry depends on that entry alone, such as ``optax.adamw``,
        ``optax.lion`` or ``optax.sgd``; put ``clip_by_global_norm`` before this chain.
      merge: what `online_merge`, `on_dare`, `on_ties` return, also inside ``optax.masked``.

    Returns:
      A transformation that emits what ``optax.chain(inner, merge)`` emits, up to which entries a
      sampled threshold looked at. `with_delta` and `merge_metrics` find the merge in its state.

    Raises:
      ValueError: when ``update`` is traced and something is to be sampled, ``inner`` mixes entries of
        a parameter (a norm, a matrix product); the operations are named. Where nothing is sampled (an
        exact threshold without metrics, small leaves) this is ``optax.chain``, whatever ``inner`` is.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     om.fused_chain(
      ...         optax.adamw(1e-6), om.on_ties(5e-7, density=0.1, threshold="sampled")
      ...     ),
      ... )
    """
    inner = optax.with_extra_args_support(inner)
    merge = optax.with_extra_args_support(merge)

    def init(params: optax.Params) -> FusedChainState:
        return FusedChainState(inner.init(params), merge.init(params))

    def update(
        updates: optax.Updates,
        state: FusedChainState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FusedChainState]:
        def step(grads: Any, inner_state: Any, params: Any) -> tuple[Any, Any]:
            return inner.update(grads, inner_state, params, **extra_args)

        def samples_of_updates(samples: dict[Path, Sample]) -> dict[Path, jax.Array]:
            take = _taker(samples)
            sampled_state = optax.tree.map_params(
                inner, take, state.inner_state, _paths(updates), is_leaf=_is_masked
            )
            grads = jax.tree.map(take, updates, _paths(updates))
            taken = None if params is None else jax.tree.map(take, params, _paths(params))
            leaves = leaves_by_path(step(grads, sampled_state, taken)[0])
            return {path: leaves[path] for path in samples}

        def merged_with(proposed: Any, take_samples: TakeSamples) -> tuple[Any, Any]:
            return merge.update(
                proposed, state.merge_state, params, update_samples=take_samples, **extra_args
            )

        wanted = _wanted_samples(merged_with, updates)
        known: dict[Path, jax.Array] = {}
        if wanted:
            _require_elementwise(step, (updates, state.inner_state, params))
            count = merge_states(state.merge_state)[0].merge_count
            known = samples_of_updates(
                {path: dataclasses.replace(one, step=count) for path, one in wanted.items()}
            )
        proposed, inner_state = step(_after(known, updates), state.inner_state, params)
        merged, merge_state = merged_with(proposed, lambda samples: {p: known[p] for p in samples})
        return merged, FusedChainState(inner_state, merge_state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _wanted_samples(
    merged_with: Callable[[Any, TakeSamples], Any], updates: Any
) -> dict[Path, Sample]:
    """Returns the samples that a merge asks for; their step is not to be used."""
    wanted: dict[Path, Sample] = {}

    def record(samples: dict[Path, Sample]) -> dict[Path, jax.Array]:
        wanted.update(samples)
        return {}

    jax.eval_shape(lambda proposed: merged_with(proposed, record), updates)
    return wanted


def _after(samples: dict[Path, jax.Array], updates: Any) -> Any:
    """Returns ``updates``, which are not known to the compiler before ``samples`` are.

    The samples are taken of moments that the step overwrites. Where nothing orders the two, the CPU
    compiler copies the moments first, which costs more than the step.
    """

    def add_zero(key_path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        sample = samples.get(path_names(key_path))
        if sample is None:
            return update
        bits = magnitude_bits(sample)
        low, high = sum_together([bits & 1, bits >> 31], tuple(range(bits.ndim)))
        # No magnitude has its highest bit set.
        return update + (low & high).astype(update.dtype)

    return jax.tree_util.tree_map_with_path(add_zero, updates)


def _taker(samples: dict[Path, Sample]) -> Callable[[Any, Any], Any]:
    def take(x: Any, name: Any) -> Any:
        # Where the inner optimizer is masked there is no array, and names of a whole subtree.
        sample = None if _is_masked(x) else samples.get(name.path)
        return x if sample is None else sample.take(x)

    return take


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


class _Named:
    """The path of a leaf, as a leaf of a tree."""

    def __init__(self, path: Path):
        self.path = path


def _paths(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: _Named(path_names(path)), tree)


def _require_elementwise(step: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Raises ValueError where an update of an entry depends on other entries."""
    jaxpr = jax.make_jaxpr(step)(*arguments)
    used = sorted(_primitives(jaxpr.jaxpr))
    mixing = [name for name in used if name.startswith(_MIXING) and name not in _SHAPELESS]
    if mixing:
        raise ValueError(
            "fused_chain needs an inner optimizer that treats every entry on its own, but it uses "
            f"{', '.join(map(repr, mixing))}: move what does (such as clip_by_global_norm) in front of "
            "fused_chain, or use optax.chain"
        )


def _primitives(jaxpr: Any) -> set[str]:
    """Returns the names of the operations on arrays that are no scalars."""
    names = set()
    for equation in jaxpr.eqns:
        inner = [p for value in equation.params.values() for p in _jaxprs(value)]
        for sub in inner:
            names |= _primitives(sub)
        if not inner and any(getattr(v.aval, "ndim", 0) for v in equation.invars):
            names.add(equation.primitive.name)
    return names


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [getattr(v, "jaxpr", v) for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]
