"""Masks and trajectories are the same on 1, 2 and 8 devices, on 1 and 2 processes, and after a restore.

Each mesh is one run of `PROGRAM` (two, where it spans two processes). It walks every merge from the
start, and once more from a checkpoint that another mesh saved, and writes digests of what it saw.
"""

import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

TIMEOUT = 120
PROGRAM = """
import functools, hashlib, json, sys
import jax, jax.numpy as jnp, numpy as np, optax, orbax.checkpoint as ocp, omerge_jax as om
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from omerge_jax.storage import SparseDelta

result, address, processes, process, restore_from, save_to = sys.argv[1:]
if int(processes) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(process))
mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))

def place(x):
    axes = [axis for axis, size in enumerate(x.shape) if size % 8 == 0]
    return NamedSharding(mesh, P(*[None] * axes[0], "x") if axes else P())

def on_mesh(make):
    shardings = jax.tree.map(place, jax.eval_shape(make))
    return jax.jit(make, out_shardings=shardings)()

@jax.jit
def gather(tree):
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))

def digest(tree):
    leaves = jax.tree.leaves(gather(tree))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()

def layer_axes(path):
    return int(path[0] == "layers")

sparse = {"delta_mask": "fixed", "storage": "sparse", "rounding": "compensated"}
MERGES = {
    "on_dare": optax.chain(optax.adamw(1e-2), om.on_dare(0.1, density=0.3)),
    # After lion all magnitudes of an update tie.
    "on_ties": optax.chain(
        optax.lion(1e-2, weight_decay=0), om.on_ties(0.1, density=0.3, layer_axes=layer_axes)),
    "step_k": optax.chain(optax.sgd(1e-2), om.on_dare(0.1, density=0.1, every_k=2, **sparse)),
    "norms": optax.chain(
        optax.sgd(1e-2), om.on_dare(om.relative(0.2), 0.3, rescale="norm", rounding="nearest")),
}

def start(tx):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    tree = lambda: {
        "w": normal(64, 24), "layers": normal(2, 64, 6).astype(jnp.bfloat16), "bias": normal(7)}
    params, delta = tree(), tree()
    return params, om.with_delta(tx.init(params), delta)

def advance(tx, params, state, step):
    grads = jax.tree.map(lambda p: jnp.cos(3 * p + step).astype(p.dtype), params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

def walk(name, carry, first, last):
    for step in range(first, last):
        carry = steps[name](*carry, step)
    return carry

steps = {name: jax.jit(functools.partial(advance, tx)) for name, tx in MERGES.items()}
starts = {name: functools.partial(start, tx) for name, tx in MERGES.items()}
seen = {"devices": jax.device_count(), "local": jax.local_device_count()}

sparsifiers = {"random": om.random(0.3), "magnitude": om.magnitude(0.3), "band": om.band(0.3)}
seen["masks"] = {}
for name, keep in sparsifiers.items():
    ctx = om.SparsifyContext(jnp.int32(5), ("w",), "update")
    mask = on_mesh(lambda: keep(jnp.ones((64, 24)), ctx) != 0)
    assert jax.device_count() == 1 or not mask.is_fully_replicated
    seen["masks"][name] = [int(mask.sum()), digest(mask)]

middle = {name: walk(name, on_mesh(make), 0, 3) for name, make in starts.items()}
params, state = middle["step_k"]
(held,) = [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, om.OnlineMergeState))
           if isinstance(s, om.OnlineMergeState)]
assert isinstance(held.reference_delta["w"], SparseDelta)
for x in (params["w"], optax.tree.get(held, "rounding_residual")["w"], held.merged_params["w"]):
    assert jax.device_count() == 1 or not x.is_fully_replicated
if save_to:
    with ocp.CheckpointManager(save_to) as manager:
        manager.save(3, args=ocp.args.StandardSave(middle))
        manager.wait_until_finished()

def finish(middle):
    ends = {name: walk(name, middle[name], 3, 6) for name in MERGES}
    params, _ = ends.pop("norms")
    digests = {name: [digest(middle[name]), digest(ends[name])] for name in ends}
    return digests, np.asarray(gather(params["w"])).ravel().tolist()

seen["straight"], seen["norms"] = finish(middle)
if restore_from:
    asked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), middle)
    with ocp.CheckpointManager(restore_from) as manager:
        restored = manager.restore(3, args=ocp.args.StandardRestore(asked))
    seen["resumed"], seen["resumed norms"] = finish(restored)
with open(f"{result}.{process}", "w") as file:
    json.dump(seen, file)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(folder, devices, processes, restore_from="", save_to=""):
    """Runs the program on that many devices in all; returns what each process wrote."""
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    folder.mkdir()
    arguments = [str(folder / "result"), f"127.0.0.1:{free_port()}", str(processes)]
    running = []
    for process in range(processes):
        command = [sys.executable, "-c", PROGRAM, *arguments, str(process), restore_from, save_to]
        with open(folder / f"log.{process}", "w") as log:
            running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    deadline = time.monotonic() + TIMEOUT
    try:
        codes = [started.wait(max(0, deadline - time.monotonic())) for started in running]
    except subprocess.TimeoutExpired:
        codes = ["not over in time"]
    finally:
        for started in running:
            started.kill()
            started.wait()
    logs = "\n".join(
        (folder / f"log.{process}").read_text()[-2000:] for process in range(processes)
    )
    assert codes == [0] * processes, f"{devices} devices, {processes} processes: {codes}\n{logs}"
    return [json.loads((folder / f"result.{p}").read_text()) for p in range(processes)]


def distinct(runs, key):
    """The different values of what every process saw, where it saw it."""
    everything = [seen for each in runs.values() for seen in each]
    return {json.dumps(seen[key], sort_keys=True) for seen in everything if key in seen}


@pytest.mark.slow
def test_masks_and_trajectories_are_the_same_everywhere_and_after_a_restore(tmp_path):
    """One test, since the runs that all of it looks at take half a minute."""
    of_8, of_2_processes = str(tmp_path / "saved on 8"), str(tmp_path / "saved by 2 processes")
    runs = {
        (8, 1): run(tmp_path / "8", 8, 1, save_to=of_8),
        (2, 1): run(tmp_path / "2", 2, 1, restore_from=of_8),
        (8, 2): run(tmp_path / "8 by 2", 8, 2, restore_from=of_8, save_to=of_2_processes),
        (1, 1): run(tmp_path / "1", 1, 1, restore_from=of_2_processes),
    }
    for (devices, processes), each in runs.items():
        assert [(seen["devices"], seen["local"]) for seen in each] == [
            (devices, devices // processes)
        ] * processes

    (masks,) = map(json.loads, distinct(runs, "masks"))
    assert masks["magnitude"][0] == masks["band"][0] == int(0.3 * 64 * 24)
    assert len({digest for _, digest in masks.values()}) == 3

    straight, resumed = distinct(runs, "straight"), distinct(runs, "resumed")
    assert len(straight) == 1
    assert resumed == straight

    # Float sums add up the shards of another mesh in another order: the last digit may differ.
    (one_device,) = runs[1, 1]
    for key in ("norms", "resumed norms"):
        for found in map(json.loads, distinct(runs, key)):
            np.testing.assert_allclose(found, one_device["norms"], rtol=1e-5, atol=1e-6)
