"""The weights that a run starts from: read once, split, and let go as soon as the state holds them.

The policy starts as the reference. So the same weights give the reference's log-probabilities (kept
on disk), the delta τ_r = reference − base, and the first parameters. Three things stay in memory
beside the state, where a run needs them: parameters that are not trained; the reference, where it
scores answers that the policy gives during training; and reference and base, where the delta is
computed at every merge.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

import omerge_jax as om
from train.config import ModelOptions, UserError
from train.inputs.model import blamed_on, hash_adapter, hash_model
from train.models import from_hf, split_model
from train.models.lora import fresh_adapters, is_adapter, read_adapters
from train.models.trainable import join, split
from train.runs.run import Run
from train.training.step import init_state
from train.types import Params, State


def hash_weights(options: ModelOptions) -> dict[str, str]:
    """Returns content hashes of all weights that a run reads: of the model, its adapter and its base.

    Raises `UserError` where base and model are the same.
    """
    hashes = {"model": hash_model(options.path)}
    if options.lora is not None and options.lora.adapter is not None:
        hashes["adapter"] = hash_adapter(options.lora.adapter)
    base = getattr(options, "base", None)
    if base is not None:
        hashes["base"] = hash_model(base)
        if hashes["base"] == hashes["model"]:
            raise _no_delta()
    return hashes


def _no_delta(as_held: str = "") -> UserError:
    return UserError(
        f"model.base holds the same weights as model.path{as_held}, so there is no delta to merge "
        "with. Give the model that model.path was fine-tuned from."
    )


class StartWeights:
    """The weights' way through a run. Nothing is read before `load`, `start` or `resume` is called.

    With `scores_answers` the reference is kept, to score answers that the policy gives during training.
    `loaded` are all parameters, until `start` or `resume` lets go of them; `frozen` are those that are
    not trained. Where they are kept, `reference` are the trained parameters as they were at the start,
    and `base` as they were before fine-tuning.
    """

    def __init__(self, run: Run, *, scores_answers: bool) -> None:
        self._run, self._options = run, run.config.optimizer
        self._delta_dtype = getattr(run.config.optimizer, "delta_dtype", None)
        self._scores_answers = scores_answers
        self._recomputes = self._options.delta_storage == "recompute"
        self._keeps_reference = scores_answers or self._recomputes
        self.loaded: Params | None = None
        self.frozen: Params = {}
        self.reference: Params | None = None
        self.base: Params | None = None

    @property
    def whole_reference(self) -> Params | None:
        """All parameters of the reference, where it scores answers during training."""
        if not self._scores_answers:
            return None
        assert self.reference is not None
        return join(self.reference, self.frozen)

    @property
    def merged_models(self) -> dict[str, Params]:
        """The models whose delta is computed at every merge; none where the state holds the delta."""
        if not self._recomputes:
            return {}
        assert self.reference is not None
        assert self.base is not None
        return {"reference_params": self.reference, "base_params": self.base}

    def load(self) -> Params:
        """Returns all parameters that training starts from, read at the first call, with adapters."""
        if self.loaded is None:
            self._run.console.print("Loading the model ...")
            params, lora = self._read("model.path", self._run.config.model.path), self._adapters()
            self.loaded = params if lora is None else join(params, lora)
        return self.loaded

    def start(self) -> State:
        """Makes the state of a new run.

        Raises `UserError` where model and base are the same in the types of this run.
        """
        params, frozen = self._run.split(self.load())
        delta = base = None
        if self._options.delta_storage is not None:
            base = self._load_base(params)
            delta, size = jax.jit(self._delta_and_size)(params, base)
            if size == 0:
                # The same weights in other files, or a difference that the types have no room for.
                types = [self._run.config.model.param_dtype, self._delta_dtype]
                raise _no_delta(f" in {' and '.join(dict.fromkeys(filter(None, types)))}")
            self._run.console.print(f"Reference delta: {size:.3g} of the norm of the weights.")
        self._keep(params, frozen, base)
        del base  # so that it is gone where `_keep` does not need it
        return self._make_state(params, delta)

    def resume(self) -> None:
        """Loads what a run needs beside a state that is restored, often nothing."""
        if self._keeps_reference or self._run.split(self._run.shapes)[1]:
            params, frozen = self._run.split(self.load())
            self._keep(params, frozen, self._load_base(params) if self._recomputes else None)
        self.loaded = None

    def abstract_state(self) -> State:
        """Returns the shapes and dtypes of what `start` makes."""
        shapes, delta = self._run.trained_shapes, None
        if self._options.holds_delta:
            delta = jax.eval_shape(self._delta, shapes, shapes)
        return jax.eval_shape(self._make_state, shapes, delta)

    def _keep(self, params: Params, frozen: Params, base: Params | None) -> None:
        """Keeps what stays in memory beside the state, and lets go of the rest."""
        self.loaded, self.frozen = None, frozen
        self.reference = params if self._keeps_reference else None
        self.base = base if self._recomputes else None

    def _read(self, field: str, path: str) -> Params:
        """Reads parameters of a model directory in the types and places of this run."""
        model = self._run.model
        types = {"dtype": model.dtype, "param_dtype": model.param_dtype}
        with blamed_on(field):
            return split_model(from_hf(path, **types, mesh=self._run.mesh))[1]

    def _adapters(self) -> Params | None:
        """Makes low-rank adapters, fresh or from a directory; None where all weights are trained."""
        model, lora = self._run.model, self._run.config.model.lora
        if lora is None:
            return None
        if lora.adapter is None:
            adapters = fresh_adapters(model, lora.seed)
        else:
            with blamed_on("model.lora.adapter"):
                adapters = read_adapters(lora.adapter, model)
        shapes = split(self._run.shapes, is_adapter)[0]
        return jax.device_put(adapters, jax.tree.map(lambda leaf: leaf.sharding, shapes))

    def _load_base(self, params: Params) -> Params:
        """Reads the trained parameters as they were before fine-tuning, when adapters added nothing."""
        if self._run.config.model.lora is not None:
            return jax.tree.map(jnp.zeros_like, params)
        self._run.console.print("Loading the base model ...")
        base = getattr(self._run.config.model, "base", None)
        assert base is not None
        return self._run.split(self._read("model.base", base))[0]

    def _make_state(self, params: Params, delta: Params | None) -> State:
        run, on_host = self._run, self._options.delta_storage == "pinned_host"
        return init_state(params, run.optimizer, delta, run.averages, delta_on_host=on_host)

    def _delta(self, params: Params, base: Params) -> Params:
        return om.task_vector(params, base, dtype=self._delta_dtype)

    def _delta_and_size(self, params: Params, base: Params) -> tuple[Params | None, jax.Array]:
        """Returns the delta where the state holds it, and its norm as a share of the weights' norm."""
        delta = self._delta(params, base)
        size = optax.tree.norm(delta) / optax.tree.norm(params)
        return delta if self._options.holds_delta else None, size
