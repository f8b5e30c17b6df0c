"""Merging on meshes: the layout is kept, nothing is gathered, and a run goes on on another mesh."""

import numpy as np

from tests.virtual_devices import run_python

MESHES = """
import re, jax, jax.numpy as jnp, numpy as np, optax, omerge_jax as om
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from omerge_jax.threshold.edge import top_k_threshold
values = np.sin(np.arange(64.0 * 32) ** 2).reshape(64, 32).astype(np.float32)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    for spec in (P("x"), P(None, "x")):
        with jax.set_mesh(mesh):
            place = NamedSharding(mesh, spec)
            params = {"w": jax.device_put(values, place)}
            tx = optax.chain(om.on_dare(0.1, density=0.5), om.on_ties(0.1, density=0.5, every_k=2))
            state = om.with_delta(tx.init(params), params)
            assert state[1].merged_params["w"].sharding.is_equivalent_to(place, 2)
            update = jax.jit(tx.update)
            for _ in range(3):
                updates, state = update(params, state, params)
            assert updates["w"].sharding.is_equivalent_to(place, 2)
            program = jax.jit(top_k_threshold, static_argnums=1).lower(params["w"], 99).compile()
            gathers = [line for line in program.as_text().splitlines() if " all-gather(" in line]
            shapes = [s for line in gathers for s in re.findall(r"\\w+\\[([\\d,]+)\\]", line)]
            # One count per device and candidate, whatever the size of the tensor.
            assert all(np.prod([int(n) for n in s.split(",")]) <= 8 * 15 for s in shapes), shapes
        print(float(jnp.sum(jnp.abs(jax.device_get(updates["w"])))))
"""


def test_any_mesh_keeps_its_layout_and_gathers_nothing():
    assert len(set(run_python("-c", MESHES, devices=8).split())) == 1


RESUME = """
import sys, jax, jax.numpy as jnp, numpy as np, optax, orbax.checkpoint as ocp, omerge_jax as om
from jax.sharding import NamedSharding, PartitionSpec as P
folder, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
devices = len(jax.devices())
mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
place = lambda x: NamedSharding(mesh, P("fsdp") if x.ndim == 2 else P())
params = {"w": jnp.sin(jnp.arange(512.0)).reshape(64, 8), "b": jnp.ones(7)}
delta = jax.tree.map(jnp.cos, params)
tx = optax.chain(optax.sgd(1e-2), om.on_dare(0.1, density=0.3), om.on_ties(0.1, density=0.4, every_k=2))
make = lambda p, d: {"params": p, "opt": om.with_delta(tx.init(p), d)}
abstract = jax.eval_shape(make, params, delta)
shardings = jax.tree.map(place, abstract)
state = jax.jit(make, out_shardings=shardings)(params, delta)
manager = ocp.CheckpointManager(folder)
if start:
    asked = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    state = manager.restore(start, args=ocp.args.StandardRestore(asked))
@jax.jit
def step(state, t):
    grads = jax.tree.map(lambda p: jnp.sin(p * 3 + t), state["params"])
    updates, opt = tx.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}
for t in range(start, stop):
    state = step(state, t)
if not start:
    manager.save(stop, args=ocp.args.StandardSave(state)); manager.wait_until_finished()
np.savez(f"{folder}-{start}-{stop}-{devices}.npz", **state["params"])
"""


def test_resume_on_another_mesh_is_the_same_trajectory(tmp_path):
    def go(devices, folder, start, stop):
        path = str(tmp_path / folder)
        run_python("-c", RESUME, path, str(start), str(stop), devices=devices)
        return np.load(f"{path}-{start}-{stop}-{devices}.npz")

    straight = go(1, "straight", 0, 7)
    go(8, "split", 0, 3)
    resumed = go(2, "split", 3, 7)
    for name in ("w", "b"):
        np.testing.assert_array_equal(straight[name], resumed[name])
