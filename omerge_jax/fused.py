"""An elementwise optimizer and a merge, chained so that statistics cost no pass of their own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from omerge_jax.entries import Entries, Part, entries_of
from omerge_jax.numerics import sum_together
from omerge_jax.paths import Path, leaves_by_path, map_by_path, path_names
from omerge_jax.state import OnlineMergeState
from omerge_jax.threshold.edge import magnitude_bits

Step = Callable[[Any, Any, Any], tuple[Any, Any]]

# Operations whose result at an entry depends on that entry of their operands alone.
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge
    gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not
    optimization_barrier or pow reduce_precision rem round rsqrt select_n sharding_constraint
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
    tan tanh xor
"""
# Operations that are as elementwise as the functions they call.
_CALLS = (
    "checkpoint closed_call cond core_call custom_jvp_call custom_vjp_call jit pjit remat2 while"
)


class FusedChainState(NamedTuple):
    """State of `fused_chain`: that of the optimizer, and that of the merge."""

    inner_state: Any
    merge_state: Any


def fused_chain(
    inner: optax.GradientTransformation, merge: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """``optax.chain(inner, merge)`` for an elementwise inner optimizer, with cheaper statistics.

    A sampled threshold and the metrics of a merge look at a small part of every update. In a plain
    chain the compiler writes the whole update out and reads it again, because two things use it. Here
    the few entries are computed a second time from the same entries of the gradients, moments and
    parameters, so that the step stays one pass over memory and needs no temporary array. An exact
    threshold takes about three more passes, each of which computes the update anew. With ``every_k``
    other than 1 the span that it is found of is written out, as in a plain chain.

    Args:
      inner: an optimizer whose update of an entry depends on that entry alone, such as ``optax.adamw``,
        ``optax.lion`` or ``optax.sgd``; put ``clip_by_global_norm`` before this chain.
      merge: what `online_merge`, `on_dare`, `on_ties` return, also inside ``optax.masked``,
        ``optax.partition`` or ``optax.inject_hyperparams``; what computes with updates, or decides
        whether a step happens, goes around the fused chain.

    Returns:
      A transformation that emits what ``optax.chain(inner, merge)`` emits, up to which entries a
      sampled threshold looked at. Exact thresholds keep exactly as many entries as long as the compiler
      rounds an update alike wherever it computes it; where a CPU fuses a multiplication and an
      addition in one place only, a few in a million entries at the threshold come out differently.
      `with_delta` and `merge_metrics` find the merge in its state.

    Raises:
      ValueError: in ``init``, another transformation stands around the merge; and, when ``update`` is
        traced and something is to be computed twice, ``inner`` mixes entries of a parameter (a norm, a
        matrix product). Where nothing is (a random mask without metrics, small leaves) this is
        ``optax.chain``, whatever ``inner`` is.

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
        merge_state = merge.init(params)
        _require_merge(merge_state)
        return FusedChainState(inner.init(params), merge_state)

    def update(updates: Any, state: FusedChainState, params: Any = None, **extra_args: Any) -> Any:
        step = functools.partial(inner.update, **extra_args)
        proposed = _Proposed(inner, step, (updates, state.inner_state, params))
        updates = proposed.entries()
        merged, merge_state = merge.update(updates, state.merge_state, params, **extra_args)
        # A merge inside of optax.masked gives the other leaves back as they were.
        merged = jax.tree.map(lambda leaf: entries_of(leaf).whole(), merged)
        return merged, FusedChainState(proposed.step()[1], merge_state)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _require_merge(state: Any) -> None:
    """Raises ValueError where something else than a merge would be given the updates."""
    if isinstance(state, optax.MaskedState | optax.InjectStatefulHyperparamsState):
        _require_merge(state.inner_state)
    elif isinstance(state, optax.PartitionState):
        for inner in state.inner_states.values():
            _require_merge(inner)
    elif not isinstance(state, OnlineMergeState):
        raise ValueError(
            "fused_chain takes what online_merge, on_dare or on_ties return, alone or inside "
            "optax.masked, optax.partition or optax.inject_hyperparams, but something else has the "
            f"state {type(state).__name__}: put it around fused_chain, or use optax.chain"
        )


class _Proposed:
    """The updates that an optimizer proposes, as leaves that can be read again.

    ``step`` is the update of ``inner``, ``arguments`` are gradients, state and parameters (or None).
    """

    def __init__(self, inner: Any, step: Step, arguments: tuple[Any, Any, Any]):
        self._inner, self._step, self._arguments = inner, step, arguments
        self._paths = _paths(arguments[0])
        self._first: dict[Path, list[jax.Array]] = {}
        self._stepped: tuple[Any, Any] | None = None
        self._is_checked = False

    def entries(self) -> Any:
        """Returns the updates of all leaves."""
        shapes, _ = jax.eval_shape(self._step, *self._arguments)

        def one(path: Path, like: jax.ShapeDtypeStruct) -> Entries:
            return Entries(
                tuple(like.shape),
                like.dtype,
                whole=lambda: leaves_by_path(self.step()[0])[path],
                read=lambda part: self._read(path, part),
                compute_first=lambda known: self._first.setdefault(path, []).append(known),
            )

        return map_by_path(one, shapes)

    def step(self) -> tuple[Any, Any]:
        """Returns the updates as arrays and the optimizer's new state; takes the step only once."""
        if self._stepped is None:
            grads, state, params = self._arguments
            self._stepped = self._step(_after(self._first, grads), state, params)
        return self._stepped

    def _read(self, path: Path, part: Part) -> jax.Array:
        """Returns a part of the update of one leaf, computed from the same part of its inputs."""
        if not self._is_checked:
            mixing = sorted(_mixing(jax.make_jaxpr(self._step)(*self._arguments).jaxpr))
            if mixing:
                raise ValueError(
                    "fused_chain needs an inner optimizer that treats every entry on its own, but it "
                    f"uses {', '.join(map(repr, mixing))}: move what does (such as "
                    "clip_by_global_norm) in front of fused_chain, or use optax.chain"
                )
            self._is_checked = True

        def of(x: Any, name: Any) -> Any:
            # Where the inner optimizer is masked there is no array, and names of a whole subtree.
            if _is_masked(x):
                return x
            # The other leaves are left out, or a step of many would be traced many times.
            return part(x) if name == repr(path) else optax.MaskedNode()

        grads, state, params = self._arguments
        state = optax.tree.map_params(self._inner, of, state, self._paths, is_leaf=_is_masked)
        params = None if params is None else jax.tree.map(of, params, _paths(params))
        proposed, _ = self._step(jax.tree.map(of, grads, self._paths), state, params)
        return leaves_by_path(proposed)[path]


def _after(first: dict[Path, list[jax.Array]], grads: Any) -> Any:
    """Returns the gradients, which the compiler is not given before what was read of updates.

    That is read from moments that the step overwrites. Where nothing orders the two, the CPU compiler
    copies the moments first, which costs more than the step.
    """

    def add_zero(path: Path, grad: jax.Array) -> jax.Array:
        for known in first.get(path, []):
            bits = magnitude_bits(known)
            low, high = sum_together([bits & 1, bits >> 31], tuple(range(bits.ndim)))
            # No magnitude has its highest bit set.
            grad = grad + (low & high).astype(grad.dtype)
        return grad

    return map_by_path(add_zero, grads)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _paths(tree: Any) -> Any:
    """Returns a tree like ``tree`` with the path of every leaf as text, since a tuple is no leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: repr(path_names(path)), tree)


def _mixing(jaxpr: Any) -> set[str]:
    """Returns the names of the operations on arrays that are not known to be elementwise."""
    names = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        called = [p for value in equation.params.values() for p in _jaxprs(value)]
        for inner in called:
            names |= _mixing(inner)
        from_arrays = any(map(_has_axes, equation.invars))
        known = name in (_CALLS if called else _ELEMENTWISE).split()
        if name == "broadcast_in_dim":
            known = not from_arrays
        if not known and (from_arrays or any(map(_has_axes, equation.outvars))):
            names.add(name)
    return names


def _has_axes(variable: Any) -> bool:
    return bool(getattr(variable.aval, "ndim", 0))


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [getattr(v, "jaxpr", v) for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]
