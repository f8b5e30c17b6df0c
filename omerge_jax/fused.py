"""An elementwise optimizer and a merge, chained so that statistics cost no pass of their own."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from omerge_jax.engine import Ahead, LookAhead, Wanted
from omerge_jax.exact import Entries
from omerge_jax.numerics import renewed, sum_together
from omerge_jax.paths import Path, leaves_by_path, path_names
from omerge_jax.sample import Sample
from omerge_jax.state import merge_states
from omerge_jax.threshold import magnitude_bits

Step = Callable[[Any, Any, Any], tuple[Any, Any]]

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
    temporary array. An exact threshold takes about three more passes; every one computes the update
    anew, so that no array of it is needed here either. With ``every_k`` other than 1 the span that
    an exact threshold is found of is written out, as in a plain chain.

    Args:
      inner: an optimizer whose update of an entry depends on that entry alone, such as ``optax.adamw``,
        ``optax.lion`` or ``optax.sgd``; put ``clip_by_global_norm`` before this chain.
      merge: what `online_merge`, `on_dare`, `on_ties` return, also inside ``optax.masked``.

    Returns:
      A transformation that emits what ``optax.chain(inner, merge)`` emits, up to which entries a
      sampled threshold looked at. Exact thresholds keep exactly as many entries as long as the compiler
      rounds an update alike wherever it computes it; where a CPU fuses a multiplication and an
      addition in one place only, a few in a million entries at the threshold come out differently.
      `with_delta` and `merge_metrics` find the merge in its state.

    Raises:
      ValueError: when ``update`` is traced and something is to be computed twice, ``inner`` mixes
        entries of a parameter (a norm, a matrix product); the operations are named. Where nothing is
        (a random mask without metrics, small leaves) this is ``optax.chain``, whatever ``inner`` is.

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

        def merged_with(proposed: Any, look_ahead: LookAhead) -> tuple[Any, Any]:
            return merge.update(
                proposed, state.merge_state, params, look_ahead=look_ahead, **extra_args
            )

        wanted = _wanted(merged_with, updates)
        known = Ahead({}, {})
        if wanted.samples or wanted.fits:
            arguments = (updates, state.inner_state, params)
            _require_elementwise(step, arguments)
            count = merge_states(state.merge_state)[0].merge_count
            known = _look_ahead(_Again(inner, step, arguments), wanted, count)
        proposed, inner_state = step(_after(known, updates), state.inner_state, params)
        merged, merge_state = merged_with(proposed, lambda wanted: _only(known, wanted))
        return merged, FusedChainState(inner_state, merge_state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _wanted(merged_with: Callable[[Any, LookAhead], Any], updates: Any) -> Wanted:
    """Returns what a merge asks for; its step is not to be used."""
    asked = Wanted({}, {})

    def record(wanted: Wanted) -> Ahead:
        asked.samples.update(wanted.samples)
        asked.fits.update(wanted.fits)
        return Ahead({}, {})

    jax.eval_shape(lambda proposed: merged_with(proposed, record), updates)
    return asked


def _only(known: Ahead, wanted: Wanted) -> Ahead:
    """Returns what one merge asks for of what is known."""
    return Ahead(
        {p: known.samples[p] for p in wanted.samples}, {p: known.fits[p] for p in wanted.fits}
    )


def _look_ahead(again: "_Again", wanted: Wanted, count: jax.Array) -> Ahead:
    """Computes what is wanted from the gradients, moments and parameters."""
    samples = {path: dataclasses.replace(one, step=count) for path, one in wanted.samples.items()}
    fits = {path: fit(again.entries(path), count) for path, fit in wanted.fits.items()}
    return Ahead(again.samples(samples), fits)


class _Again:
    """Updates of an elementwise optimizer, computed once more from parts of what they are made of.

    Args:
      inner: the optimizer.
      step: its update.
      arguments: gradients, state and parameters (or None).
    """

    def __init__(self, inner: Any, step: Step, arguments: tuple[Any, Any, Any]):
        self.inner, self.step, self.arguments = inner, step, arguments
        self.paths = _paths(arguments[0])

    def samples(self, samples: dict[Path, Sample]) -> dict[Path, jax.Array]:
        """Returns samples of the updates."""
        if not samples:
            return {}

        def take(path: Path, x: Any) -> Any:
            sample = samples.get(path)
            return x if sample is None else sample.take(x)

        leaves = self._updates(take)
        return {path: leaves[path] for path in samples}

    def entries(self, path: Path) -> Entries:
        """Returns the update of one leaf as it can be had again and again."""

        def of(part: Callable[[jax.Array], jax.Array]) -> jax.Array:
            # The other leaves are left out, or a step of many would be traced many times.
            return self._updates(lambda p, x: part(x) if p == path else optax.MaskedNode())[path]

        return Entries(
            shape=leaves_by_path(self.arguments[0])[path].shape,
            compute=lambda turn: of(lambda x: renewed(x, turn)),
            sample=lambda sample: of(sample.take),
        )

    def _updates(self, part: Callable[[Path, Any], Any]) -> dict[Path, jax.Array]:
        def of(x: Any, name: Any) -> Any:
            # Where the inner optimizer is masked there is no array, and names of a whole subtree.
            return x if _is_masked(x) else part(name.path, x)

        grads, state, params = self.arguments
        state = optax.tree.map_params(self.inner, of, state, self.paths, is_leaf=_is_masked)
        params = None if params is None else jax.tree.map(of, params, _paths(params))
        return leaves_by_path(self.step(jax.tree.map(of, grads, self.paths), state, params)[0])


def _after(known: Ahead, updates: Any) -> Any:
    """Returns ``updates``, which are not available to the compiler before what is known of them is.

    That comes from moments that the step overwrites. Where nothing orders the two, the CPU compiler
    copies the moments first, which costs more than the step.
    """

    def add_zero(key_path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        path = path_names(key_path)
        for one in (known.samples.get(path), known.fits.get(path)):
            if one is not None:
                bits = magnitude_bits(one)
                low, high = sum_together([bits & 1, bits >> 31], tuple(range(bits.ndim)))
                # No magnitude has its highest bit set.
                update = update + (low & high).astype(update.dtype)
        return update

    return jax.tree_util.tree_map_with_path(add_zero, updates)


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
