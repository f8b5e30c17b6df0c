"""Meshes over several slices of TPUs and over hosts of GPUs, by what the devices say."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from tests.train.builders import needs_compiler, run_with_compiler
from train.config import MeshOptions, UserError
from train.distributed.batches import row_devices
from train.distributed.mesh import arrange, count_slices, mesh_shape


@dataclass(frozen=True)
class Device:
    """What a mesh is arranged by, as JAX's devices have it."""

    id: int
    process_index: int
    slice_index: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def tpus(slices, side=4):
    """Slices of a v5e of side x side chips, 4 to a host, in no order."""
    chips = itertools.product(range(slices), range(side), range(side))
    devices = [
        Device(
            id=100_000 * (number + 1) + side * y + x,
            process_index=side * side // 4 * number + (side * y + x) // 4,
            slice_index=number,
            platform="tpu",
            device_kind="TPU v5 lite",
            coords=(x, y, 0),
        )
        for number, y, x in chips
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


def gpus(hosts, each=8):
    """Hosts with a process for every GPU; JAX calls every host a slice."""
    devices = [
        Device(number, number, number // each, "gpu", "NVIDIA H100 80GB HBM3")
        for number in range(hosts * each)
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


def shared(mesh, axes, attribute):
    """Whether devices that differ along some axes alone have an attribute in common."""
    values = np.vectorize(lambda device: getattr(device, attribute))(mesh.devices)
    numbers = tuple(mesh.axis_names.index(axis) for axis in axes)
    return bool(np.all(values.max(numbers) == values.min(numbers)))


@pytest.mark.parametrize(
    ("slices", "options"),
    [
        (2, MeshOptions()),
        (2, MeshOptions(tensor=4)),
        (2, MeshOptions(data=4, tensor=2)),
        (4, MeshOptions(data=8, fsdp=4, tensor=2)),
        (3, MeshOptions(data=3)),
    ],
)
def test_parameters_are_split_within_a_slice_alone(slices, options):
    devices = tpus(slices)
    shape = mesh_shape(options, len(devices), count_slices(devices))
    mesh = arrange(devices, shape)
    assert mesh.devices.shape == shape
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    assert shared(mesh, ("fsdp", "tensor"), "slice_index")
    assert not shared(mesh, ("data",), "slice_index")
    assert row_devices(mesh) == shape[0] * shape[1]
    # The first axis walks through a slice before it leaves it.
    along = [device.slice_index for device in mesh.devices[:, 0, 0]]
    assert along == sorted(along)


def test_a_slice_is_arranged_as_it_would_be_alone():
    devices = tpus(2)
    one = [device for device in devices if device.slice_index == 1]
    both, alone = arrange(devices, (2, 8, 2)), arrange(one, (1, 8, 2))
    assert np.array_equal(both.devices[1], alone.devices[0])
    assert count_slices(one) == 1


def test_unset_data_is_the_number_of_slices():
    assert mesh_shape(MeshOptions(), 32, slices=2) == (2, 16, 1)
    assert mesh_shape(MeshOptions(tensor=4), 64, slices=4) == (4, 4, 4)
    assert mesh_shape(MeshOptions(), 16) == (1, 16, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MeshOptions(data=1), r"mesh.data must be a multiple of 2 \(slices .*unset, got 1\."),
        (MeshOptions(data=3), r"mesh.data must be a multiple of 2 \(slices .*unset, got 3\."),
        (MeshOptions(data=2, fsdp=8), r"must be 32, the devices of all 2 slices, got 16\."),
        (MeshOptions(fsdp=32), r"mesh.data \* mesh.fsdp \* mesh.tensor must be at most 32"),
        (MeshOptions(tensor=3), r"mesh.data \* mesh.tensor must be a divisor of the 32"),
    ],
)
def test_meshes_that_slices_cannot_have_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(options, 32, slices=2)


@pytest.mark.parametrize("shape", [(1, 16, 1), (2, 8, 1), (1, 4, 4), (2, 1, 8), (4, 2, 2)])
def test_tensor_stays_on_a_host_of_gpus_and_fsdp_may_leave_it(shape):
    devices = gpus(2)
    assert count_slices(devices) == 1
    mesh = arrange(devices, shape)
    assert sorted(d.id for d in mesh.devices.flat) == list(range(16))
    assert shared(mesh, ("tensor",), "slice_index")
    assert shared(mesh, ("fsdp", "tensor"), "slice_index") == (shape[0] > 1)


REAL = """
from train.plan.environment import prepare_environment
prepare_environment("2xv5e:4x4")
from train.config import MeshOptions
from train.plan.target import read_target
from train.distributed.mesh import count_slices

for topology, options, shape in (
    ("2xv5e:4x4", MeshOptions(tensor=2), (2, 8, 2)),
    ("4xv5p:2x2x2", MeshOptions(data=8, tensor=2), (8, 2, 2)),
    ("3xv6e:2x4", MeshOptions(), (3, 8, 1)),
):
    target = read_target(topology)
    assert target.slices == count_slices(target.devices)
    mesh = target.mesh(options)
    assert mesh.devices.shape == shape, mesh
    assert len(set(mesh.devices.flat)) == target.chips == len(target.devices)
    assert all(len({device.slice_index for device in part.flat}) == 1 for part in mesh.devices)
print("as arranged")
"""


@needs_compiler
def test_slices_as_the_compiler_describes_them():
    assert "as arranged" in run_with_compiler("-c", REAL)
