"""What all kinds of alignment share: the way of the weights through a run.

The policy starts as the reference, so the weights are read once: they give the reference's
log-probabilities (kept on disk), the delta τ_r = reference − base, and the first parameters. Neither
the reference nor the base stays in memory, except for a reference that follows the policy, one that
has to score answers which the policy gives during training, and both where the delta is not held but
computed at every merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import omerge_jax as om
from train.config import DPOConfig, GRPOConfig, KTOConfig, OnlineDPOConfig, UserError
from train.data import TokenDataset
from train.distributed.mesh import Params, on_mesh
from train.evaluation.held_out import Evaluate, Score, answer_logps
from train.inputs.model import blamed_on, hash_model, hash_start
from train.models import layer_axes
from train.models.trainable import join
from train.optimizers.build import make_optimizer
from train.optimizers.check import check_optimizer
from train.runs.reference import Scores, cache_file, with_reference
from train.runs.run import Run
from train.training.loop import Prepared
from train.training.step import Batch, LossFn, State, init_state

Config = DPOConfig | KTOConfig | OnlineDPOConfig | GRPOConfig


@dataclass(frozen=True)
class Objective:
    """What one kind of alignment gives to `align`.

    Attributes:
        loss_fn: From `train.objectives.preference`.
        evaluate: Makes the evaluation of held-out rows, which have their reference columns.
        score: Log-probabilities of the answers, which the reference's are computed with.
        names: Kinds of answers that `score` gives; none when the loss asks no reference.
        depends_on: Settings that change what `score` gives.
        check_first: Raises `ValueError` when the metrics of step 1 of a new run cannot be.
        shuffle: Whether every epoch draws a new order.
        synced: Whether the reference follows the policy, and is scored at every step.
        sample: `f(policy, reference, batch, done)`: the batch of a step of the loader's prompts, given
            all parameters of both and the number of steps done, and what is logged of it. The
            reference is the start, and None where `names` are none.
        inputs: Content hashes of what else the run reads, by name.
    """

    loss_fn: LossFn
    evaluate: Callable[[TokenDataset], Evaluate]
    score: Score
    names: tuple[str, ...]
    depends_on: tuple[str | float, ...]
    check_first: Callable[[Mapping[str, float]], None]
    shuffle: bool = True
    synced: bool = False
    sample: Callable[[Params, Params | None, Batch, int], Prepared] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


def check_merge(config: Config) -> None:
    """Checks that there is a base model, or an adapter, exactly where the optimizer merges with it.

    Raises:
        UserError: it is missing, or of no use.
    """
    check_optimizer(config.optimizer)
    name, base, lora = config.optimizer.name, config.model.base, config.model.lora
    merges = config.optimizer.delta_storage is not None
    if lora is not None and merges and lora.adapter is None:
        raise UserError(
            f"model.lora.adapter is not set; {name} merges adapters with those of the reference, and "
            "fresh ones hold nothing. Give the adapter of the SFT model, or train all weights."
        )
    if lora is not None and base is not None:
        raise UserError(
            f"model.base is set to {base!r}, but with model.lora the delta is that of the adapters, "
            "whose base has none. Unset it."
        )
    if lora is None and base is None and merges:
        raise UserError(
            f"model.base is not set; {name} merges with the delta between model.path and the "
            "pre-trained model it was fine-tuned from. Give that model's directory."
        )
    if base is not None and config.optimizer.alpha is None:
        raise UserError(
            f"model.base is set to {base!r}, but {name} has no use for it. Unset it, or choose a "
            "merging optimizer.name."
        )


def align(config: Config, this: Run, objective: Objective) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises:
        UserError: base and model are the same, or a schedule does not fit the run; before training
            starts.
    """
    base, inputs = config.model.base, hash_start(config.model)
    reference = "".join(inputs.values())
    if base is not None:
        inputs["base"] = hash_model(base)
        if inputs["base"] == inputs["model"]:
            raise _no_delta()
    alignment = _Alignment(config, this, objective, reference)
    this.begin(**inputs, **objective.inputs)
    with on_mesh(this.mesh):
        alignment.train()


def _no_delta(as_held: str = "") -> UserError:
    return UserError(
        f"model.base holds the same weights as model.path{as_held}, so there is no delta to merge "
        "with. Give the model that model.path was fine-tuned from."
    )


class _Alignment:
    """The weights' way through a run: loaded once, let go as soon as the state exists."""

    def __init__(
        self,
        config: Config,
        this: Run,
        objective: Objective,
        model_hash: str,
    ) -> None:
        self.config, self.run, self.objective = config, this, objective
        self.model_hash = model_hash
        self.tx = make_optimizer(
            config.optimizer, this.schedule, layer_axes=layer_axes, steps=this.steps
        )
        self.loaded: Params | None = None
        self.frozen: Params | None = None
        self.reference: Params | None = None
        self.base: Params | None = None

    def train(self) -> None:
        this, objective, evaluate = self.run, self.objective, None
        sampled = objective.sample is not None
        data = this.data if objective.synced or sampled else self._with_reference(this.data)
        if this.held_out is not None:
            evaluate = objective.evaluate(
                this.held_out if sampled else self._with_reference(this.held_out)
            )
        if this.resumes:
            # Nothing will ask for the weights that scored the reference: the state is restored.
            self.loaded = None
        this.train(
            objective.loss_fn,
            self.tx,
            self._start,
            like=jax.eval_shape(self._make_state, this.trained_shapes, self._delta_shapes()),
            data=data,
            evaluate=evaluate,
            frozen=self._frozen,
            models=self._models,
            check_first=self._check_first,
            reference_columns=self._reference_columns if objective.synced else None,
            shuffle=objective.shuffle,
            prepare=self._sampled if sampled else None,
        )

    @property
    def _holds_reference(self) -> bool:
        return self.objective.sample is not None and bool(self.objective.names)

    def _sampled(self, params: Params, batch: Batch, done: int) -> Prepared:
        assert self.objective.sample is not None
        frozen, reference = self._frozen(), None
        if self._holds_reference:
            assert self.reference is not None
            reference = join(self.reference, frozen)
        return self.objective.sample(params, reference, batch, done)

    def _reference_columns(self, params: Params, batch: Batch) -> Batch:
        names = [f"reference_{name}_logps" for name in self.objective.names]
        return dict(zip(names, self.objective.score(params, batch), strict=True))

    @property
    def _recomputes(self) -> bool:
        return self.config.optimizer.delta_storage == "recompute"

    def _models(self) -> dict[str, Params]:
        """What a delta is computed from at every merge; nothing where it is held."""
        if not self._recomputes:
            return {}
        self._frozen()
        assert self.reference is not None
        assert self.base is not None
        return {"reference_params": self.reference, "base_params": self.base}

    def _frozen(self) -> Params:
        if self.frozen is None:  # a run that goes on
            held = self._holds_reference or self._recomputes
            wanted = held or self.run.split(self.run.shapes)[1]
            trained, frozen = self.run.split(self._params()) if wanted else ({}, {})
            self._keep(trained, frozen, self._base_of(trained) if self._recomputes else None)
            return frozen
        return self.frozen

    def _keep(self, trained: Params, frozen: Params, base: Params | None) -> None:
        """What stays in memory of the weights that training starts from, and of the base's."""
        held = self._holds_reference or self._recomputes
        self.loaded, self.frozen = None, frozen
        self.reference = trained if held else None
        self.base = base if self._recomputes else None

    def _params(self) -> Params:
        if self.loaded is None:
            self.run.console.print("Loading the model ...")
            self.loaded = self.run.load_start()
        return self.loaded

    def _with_reference(self, dataset: TokenDataset) -> TokenDataset:
        model, names = self.config.model, self.objective.names
        if not names:
            return dataset
        assert not isinstance(self.config, OnlineDPOConfig | GRPOConfig)
        cache = self.config.reference_cache
        directory = self.run.output.path / "reference" if cache is None else Path(cache)
        computation = [model.dtype, model.param_dtype, *self.objective.depends_on]

        def compute(dataset: TokenDataset) -> Scores:
            logps = answer_logps(
                self.objective.score,
                self._params(),
                dataset,
                self.run.eval_batch_size,
                self.run.mesh,
                shown_as=f"reference log-probabilities of {len(dataset)} rows",
            )
            return dict(zip(names, logps, strict=True))

        file = cache_file(directory, self.model_hash, dataset, computation)
        return with_reference(dataset, file, names, compute)

    def _make_state(self, params: Params, delta: Params | None) -> State:
        on_host = self.config.optimizer.delta_storage == "pinned_host"
        return init_state(params, self.tx, delta, self.run.followers, delta_on_host=on_host)

    def _delta_of(self, params: Params, base: Params) -> Params:
        return om.task_vector(params, base, dtype=self.config.optimizer.delta_dtype)

    def _delta_and_size(self, params: Params, base: Params) -> tuple[Params | None, jax.Array]:
        """The delta, where it is held, and its norm as a share of that of the weights."""
        delta = self._delta_of(params, base)
        size = optax.tree.norm(delta) / optax.tree.norm(params)
        return delta if self.config.optimizer.holds_delta else None, size

    def _delta_shapes(self) -> Params | None:
        if not self.config.optimizer.holds_delta:
            return None
        shapes = self.run.trained_shapes
        return jax.eval_shape(self._delta_of, shapes, shapes)

    def _base_of(self, params: Params) -> Params:
        """What the trained parameters were before fine-tuning; adapters were not there yet."""
        if self.config.model.lora is not None:
            return jax.tree.map(jnp.zeros_like, params)
        assert self.config.model.base is not None
        self.run.console.print("Loading the base model ...")
        return self.run.split(self.run.load(self.config.model.base, "model.base"))[0]

    def _start(self) -> State:
        params, frozen = self.run.split(self._params())
        delta = base = None
        if self.config.optimizer.delta_storage is not None:
            base = self._base_of(params)
            delta, size = jax.jit(self._delta_and_size)(params, base)
            if size == 0:
                # The same weights in other files, or a difference that the types have no room for.
                types = [self.config.model.param_dtype, self.config.optimizer.delta_dtype]
                raise _no_delta(f" in {' and '.join(dict.fromkeys(filter(None, types)))}")
            self.run.console.print(f"Reference delta: {size:.3g} of the norm of the weights.")
        self._keep(params, frozen, base)
        del base
        return self._make_state(params, delta)

    def _check_first(self, metrics: Mapping[str, float]) -> None:
        with blamed_on("reference"):
            self.objective.check_first(metrics)
