"""The structure of a model and the shapes and places of its parameters, without weights."""

from __future__ import annotations

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding

from train.distributed.axes import partition_spec
from train.models.config import ModelConfig
from train.models.hf_names import abstract_decoder, decoder_leaves
from train.types import Params


def abstract_model(
    config: ModelConfig, mesh: Mesh | AbstractMesh | None
) -> tuple[nnx.GraphDef, Params]:
    """The structure of a model, and its parameters as `jax.ShapeDtypeStruct` with their places.

    Both are as `train.models.split_model` makes them.
    """
    graphdef, state = abstract_decoder(config)
    params = nnx.to_pure_dict(state)
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), params)
    else:
        places = param_shardings(config, mesh)
    return graphdef, jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        params,
        places,
    )


def param_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """Where each parameter goes on a mesh: a tree of `NamedSharding` like that of `split_model`.

    Input sides of matrices are split over ``"fsdp"`` and output sides over ``"tensor"``, reversed
    in the projections back to the residual stream; norms are replicated. An axis that the mesh
    lacks or whose size does not divide stays whole.

    Raises:
        ValueError: the mesh has explicit axes, with which every operation would have to be told
            its output sharding.
    """
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"the mesh has axis types {mesh.axis_types}; make it with "
            "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))"
        )
    return unflatten_dict(
        {
            path: NamedSharding(mesh, partition_spec(leaf.axes, leaf.shape, mesh))
            for path, leaf in decoder_leaves(config).items()
        }
    )
