"""The device mesh of a run, and where parameters and batches lie on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from train.config import require
from train.models import Decoder, ModelConfig, param_shardings, split_model

Params = dict[str, Any]


def make_mesh(fsdp: int | None) -> Mesh | None:
    """A mesh with the axes ``fsdp`` and ``tensor`` that the models' parameters name.

    Args:
        fsdp: Devices to use; None: all of them.

    Returns:
        The mesh, or None for a single device, where none is needed.

    Raises:
        UserError: there are fewer devices.
    """
    devices = jax.devices()
    count = len(devices) if fsdp is None else fsdp
    require(count <= len(devices), "trainer.fsdp", count, f"at most {len(devices)} (devices here)")
    if count == 1:
        return None
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count, 1), ("fsdp", "tensor"), axes, devices=devices[:count])


def check_batch(name: str, batch_size: int, mesh: Mesh | None, parts: int = 1) -> None:
    """Raises `UserError` when a batch, or each of its equal parts, cannot be split over the mesh."""
    devices = 1 if mesh is None else mesh.shape["fsdp"]
    reasons = [f"{devices} devices of the mesh"] if parts == 1 or devices > 1 else []
    if parts > 1:
        reasons.append(f"{parts} trainer.gradient_accumulation_steps")
    count = devices * parts
    expected = f"a multiple of {count} ({' times '.join(reasons)})"
    require(batch_size % count == 0, name, batch_size, expected)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Moves a batch onto the devices, its rows split over ``fsdp``.

    Args:
        batch: Arrays with the rows on axis 0; on several hosts, this host's rows.
        mesh: From `make_mesh`.
    """
    if mesh is None:
        return {name: jax.device_put(value) for name, value in batch.items()}
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    return {
        name: jax.make_array_from_process_local_data(rows, value) for name, value in batch.items()
    }


def abstract_model(config: ModelConfig, mesh: Mesh | None) -> tuple[nnx.GraphDef, Params]:
    """The structure of a model and the shapes and places of its parameters, without weights.

    Args:
        config: With the dtypes of the run.
        mesh: From `make_mesh`.

    Returns:
        The graph definition and a tree of `jax.ShapeDtypeStruct` as `train.models.split_model`
        makes them.
    """
    graphdef, params = split_model(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), params)
    else:
        places = param_shardings(config, mesh)
    return graphdef, jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        params,
        places,
    )
