"""Names for the leaves of a pytree that do not depend on its containers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Path = tuple[str, ...]
Axes = tuple[int, ...]
LayerAxes = int | Axes | Callable[[Path], int | Axes] | Any


def path_names(key_path: tuple[Any, ...]) -> Path:
    """Returns the names along a JAX key path, the same for every container.

    A dict key, an attribute and a sequence index count by their name alone, and the trailing
    ``value`` that ``flax.nnx`` variables and boxed parameters add is dropped, so that a plain dict,
    a ``FrozenDict``, an ``nnx.State`` and a ``NamedTuple`` of the same parameters agree.
    """
    keys = list(key_path)
    while keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys.pop()
    return tuple(_key_name(key) for key in keys)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def show(path: Path) -> str:
    """Returns ``a/b/c`` for messages."""
    return "/".join(path) or "<root>"


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[Path, Any]:
    """Returns the leaves of ``tree`` by the names on their path; ``is_leaf`` as in ``jax.tree.map``.

    Raises ValueError where two leaves share a name, such as the keys ``1`` and ``"1"`` of one dict.
    """
    leaves: dict[Path, Any] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]:
        path = path_names(key_path)
        if path in leaves:
            raise ValueError(f"two leaves of the tree are both called {show(path)}; rename one")
        leaves[path] = leaf
    return leaves


def map_by_path(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Maps ``function(path, leaf, *others)`` over the leaves of ``tree``.

    The ``others`` are matched by path: they may use other containers and may hold more leaves.
    """
    known = [leaves_by_path(other) for other in others]

    def one(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = path_names(key_path)
        return function(path, leaf, *(leaves[path] for leaves in known))

    return jax.tree_util.tree_map_with_path(one, tree)


def layer_axes_of(layer_axes: LayerAxes, path: Path, ndim: int) -> Axes:
    """Returns which axes of the leaf at ``path``, which has ``ndim``, index separate tensors.

    ``layer_axes`` is None (no stacked leaf), an int n for the n leading axes of every leaf, a tuple of
    ints for these axes, a callable of the path that returns one of these, or a pytree of them whose
    structure is a prefix of the parameters'. A tuple at the top is a tuple of axes.

    Raises ValueError where the leaf has no such axes, or a pytree prefix has no entry for the leaf.

    Example:
      >>> layer_axes_of({"layers": (1,), "head": 0}, ("layers", "kernel"), ndim=3)
      (1,)
    """
    rule = layer_axes_rule(layer_axes)
    chosen: Any = rule(path) if callable(rule) else rule
    if _is_axes(chosen):
        axes = tuple(int(axis) for axis in chosen)
        if all(-ndim <= axis < ndim for axis in axes):
            axes = tuple(axis % ndim for axis in axes)
            if len(set(axes)) == len(axes):
                return axes
        raise ValueError(
            f"layer_axes must name different axes of a leaf, got {axes} for the parameter {show(path)} "
            f"with {ndim} axes"
        )
    count = int(chosen or 0)
    if not 0 <= count <= ndim:
        raise ValueError(
            f"layer_axes must be between 0 and the number of axes, got {count} for the parameter "
            f"{show(path)} with {ndim} axes"
        )
    return tuple(range(count))


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(axis, int) for axis in node)


def to_front(x: jax.Array, axes: Axes) -> jax.Array:
    """Returns ``x`` with ``axes`` moved to the front, as sparsifiers see a leaf."""
    return jnp.moveaxis(x, axes, range(len(axes))) if _moves(axes) else x


def from_front(x: jax.Array, axes: Axes) -> jax.Array:
    """Returns ``x`` with its leading axes moved back to ``axes``, see `to_front`."""
    return jnp.moveaxis(x, range(len(axes)), axes) if _moves(axes) else x


def _moves(axes: Axes) -> bool:
    return axes != tuple(range(len(axes)))


@dataclasses.dataclass(frozen=True)
class _Prefix:
    """A tree prefix as a callable of the path, which compares and hashes by its entries."""

    entries: tuple[tuple[Path, Any], ...]

    def __call__(self, path: Path) -> Any:
        leaves = dict(self.entries)
        for length in range(len(path), -1, -1):
            if path[:length] in leaves:
                return leaves[path[:length]]
        raise ValueError(f"layer_axes has no entry for the parameter {show(path)}")


def layer_axes_rule(layer_axes: LayerAxes) -> LayerAxes:
    """Returns ``layer_axes`` in a form that has a hash: a tree prefix becomes a callable."""
    if isinstance(layer_axes, jax.Array):
        raise ValueError(
            "layer_axes must be known when the program is traced; under optax.inject_hyperparams name "
            "it in static_args"
        )
    if callable(layer_axes) or isinstance(layer_axes, (int, type(None))) or _is_axes(layer_axes):
        return layer_axes
    return _Prefix(tuple(leaves_by_path(layer_axes, _is_axes).items()))
