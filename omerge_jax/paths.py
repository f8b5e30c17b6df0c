"""Names for the leaves of a pytree that do not depend on its containers."""

from collections.abc import Callable
from typing import Any

import jax

Path = tuple[str, ...]
LayerAxes = int | Callable[[Path], int] | Any


def path_names(key_path: tuple[Any, ...]) -> Path:
    """Returns the names along a JAX key path, the same for every container.

    A dict key, an attribute and a sequence index count by their name alone, and the trailing
    ``value`` that ``flax.nnx`` variables and boxed parameters add is dropped, so that a plain dict,
    a ``FrozenDict``, an ``nnx.State`` and a ``NamedTuple`` of the same parameters agree.

    Args:
      key_path: a key path as given by ``jax.tree_util.tree_flatten_with_path``.

    Returns:
      The names, outermost first.
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
    """Returns the leaves of ``tree`` by the names on their path.

    Args:
      tree: any pytree.
      is_leaf: what else counts as a leaf, as in ``jax.tree.map``.

    Raises:
      ValueError: two leaves share a name (for example the keys ``1`` and ``"1"`` of one dict).
    """
    leaves: dict[Path, Any] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]:
        path = path_names(key_path)
        if path in leaves:
            raise ValueError(f"two leaves of the tree are both called {show(path)}; rename one")
        leaves[path] = leaf
    return leaves


def resolve_layer_axes(layer_axes: LayerAxes, path: Path, ndim: int) -> int:
    """Returns how many leading axes of the leaf at ``path`` index separate tensors.

    Args:
      layer_axes: ``None`` (no stacked leaf), an int for every leaf, a callable of the path, or a
        pytree of ints whose structure is a prefix of the parameters'.
      path: the leaf's path names.
      ndim: the leaf's number of axes.

    Raises:
      ValueError: the answer is negative, or more than the leaf has axes, or a pytree prefix has no
        entry for the leaf.
    """
    axes: int = 0
    if isinstance(layer_axes, jax.Array):
        raise ValueError(
            "layer_axes must be known when the program is traced; under optax.inject_hyperparams name "
            "it in static_args"
        )
    if isinstance(layer_axes, int):
        axes = layer_axes
    elif callable(layer_axes):
        axes = int(layer_axes(path))  # pyright: ignore[reportArgumentType]
    elif layer_axes is not None:
        axes = int(from_prefix(layer_axes, path, "layer_axes"))
    if not 0 <= axes <= ndim:
        raise ValueError(
            f"layer_axes must be between 0 and the number of axes, got {axes} for the parameter "
            f"{show(path)} with {ndim} axes"
        )
    return axes


def from_prefix(prefix: Any, path: Path, name: str) -> Any:
    """Returns what a tree whose structure is a prefix of the parameters' says of one leaf.

    Args:
      prefix: the tree.
      path: the leaf's path names.
      name: what the tree is called in messages.

    Raises:
      ValueError: it says nothing of the leaf.
    """
    leaves = leaves_by_path(prefix)
    for length in range(len(path), -1, -1):
        if path[:length] in leaves:
            return leaves[path[:length]]
    raise ValueError(f"{name} has no entry for the parameter {show(path)}")
