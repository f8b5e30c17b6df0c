"""Every recorded run of the authors' optimizers is reproduced through the public API."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om

DATA = Path(__file__).parents[1] / "data" / "parity"
RUNS = json.loads((DATA / "index.json").read_text())
TOLERANCE = 5e-6


class Recorded:
    """One recorded run."""

    def __init__(self, run):
        self.run = run
        self.arrays = dict(np.load(DATA / f"{run['name']}.npz"))

    def tree(self, prefix):
        names = [name for name in self.arrays if name.rpartition("/")[0] == prefix]
        return {name.rpartition("/")[2]: jnp.asarray(self.arrays[name]) for name in names}

    def draw(self, x, density, ctx):
        """The Bernoulli draws of the recorded run in place of our own."""
        name = ctx.path[-1]
        if ctx.role == "delta":
            return jnp.asarray(self.arrays[f"tau_mask/{name}"], bool)
        blank = np.zeros(x.shape, bool)
        steps = range(self.run["steps"])
        masks = [self.arrays.get(f"mask/{step}/{name}", blank) for step in steps]
        return jnp.asarray(np.stack(masks), bool)[ctx.step]

    def optimizer(self):
        run = self.run
        common = {
            "alpha": run["alpha"],
            "density": run["reserve_p"],
            "weight_decay": run.get("weight_decay", 0.0),
            "eps": run.get("eps", 1e-6),
            "every_k": run.get("online_step", 1),
            "rounding": "nearest",
        }
        if run["cls"] == "OnTIES":
            rescale = "norm" if run.get("rescale") else "none"
            return om.on_ties_adamw(run["lr"], rescale=rescale, **common)
        rescale = "norm" if run.get("rescale") else "inverse"
        random = {"rescale": rescale, "delta_mask": "fixed", "draw": self.draw}
        return om.on_dare_adamw(run["lr"], **random, **common)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_parameters_follow_the_recorded_run(run):
    recorded = Recorded(run)
    params = recorded.tree("ref")
    tx = recorded.optimizer()
    state = om.with_delta(tx.init(params), om.task_vector(params, recorded.tree("base")))
    update = jax.jit(tx.update)
    for step in range(run["steps"]):
        updates, state = update(recorded.tree(f"grad/{step}"), state, params)
        params = optax.apply_updates(params, updates)
        for name, expected in recorded.tree(f"params/{step}").items():
            error = np.abs(np.asarray(params[name]) - expected).max() / np.abs(expected).max()
            assert error <= TOLERANCE, (run["name"], step, name, error)


@pytest.mark.parametrize("run", [run for run in RUNS if "eps" in run], ids=lambda run: run["name"])
def test_rescaling_divides_by_the_norm_plus_the_eps_of_adam(run):
    """Small updates show it: next to their norm eps is not small. It is what is moved that tells."""
    recorded = Recorded(run)
    start = recorded.tree("ref")
    params, tx = start, recorded.optimizer()
    state = om.with_delta(tx.init(params), om.task_vector(params, recorded.tree("base")))
    update = jax.jit(tx.update)
    for step in range(run["steps"]):
        updates, state = update(recorded.tree(f"grad/{step}"), state, params)
        params = optax.apply_updates(params, updates)
    for name, end in recorded.tree(f"params/{run['steps'] - 1}").items():
        moved = np.asarray(end, np.float64) - np.asarray(start[name], np.float64)
        error = np.asarray(params[name], np.float64) - np.asarray(end, np.float64)
        assert np.abs(error).max() <= 0.02 * np.abs(moved).max()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_sparsified_delta_is_the_recorded_one(run):
    recorded = Recorded(run)
    delta = om.task_vector(recorded.tree("ref"), recorded.tree("base"))
    rescaled = run.get("rescale")
    if run["cls"] == "OnTIES":
        sparsifier = om.magnitude(run["reserve_p"], rescale="norm" if rescaled else "none")
    else:
        rescale = "norm" if rescaled else "inverse"
        sparsifier = om.random(run["reserve_p"], rescale=rescale, draw=recorded.draw)
    for name, expected in recorded.tree("tau").items():
        ctx = om.SparsifyContext(step=jnp.int32(0), path=(name,), role="delta")
        np.testing.assert_allclose(sparsifier(delta[name], ctx), expected, rtol=2e-6, atol=0)
