"""``python -m train dpo``: alignment on preferences, with or without online merging.

The policy starts as the reference, so the weights are read once: they give the reference's
log-probabilities (kept on disk), the delta τ_r = reference − base, and the first parameters. Neither
the reference nor the base stays in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import omerge_jax as om
from train.config import DPOConfig, UserError
from train.data import TokenDataset, tokenize_preference
from train.held_out import evaluate_preferences, pair_logps
from train.losses import pair_loss
from train.models import layer_axes
from train.optimizers import check_optimizer, make_optimizer, needs_delta, takes_delta
from train.prepare import blamed_on, check_related, hash_model, hash_start
from train.reference import Scores, cache_file, with_reference
from train.run import Run, set_up
from train.sharding import Params
from train.step import Batch, State, check_starts_at_reference, init_state, preference_loss
from train.step import reference_logps_fn as make_score


def run(config: DPOConfig) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises:
        UserError: something given cannot be used; before training starts.
    """
    _check(config)
    this = set_up("dpo", config, tokenize_preference)
    if this is None:
        return
    base = config.model.base
    if base is not None:
        check_related(base, config.model.path, "model.base")
    inputs = hash_start(config.model)
    reference = "".join(inputs.values())
    if base is not None:
        inputs["base"] = hash_model(base)
        if inputs["base"] == inputs["model"]:
            raise _no_delta()
    this.begin(**inputs)
    _Alignment(config, this, reference).train()


def _no_delta(as_held: str = "") -> UserError:
    return UserError(
        f"model.base holds the same weights as model.path{as_held}, so there is no delta to merge "
        "with. Give the model that model.path was fine-tuned from."
    )


def _check(config: DPOConfig) -> None:
    check_optimizer(config.optimizer)
    name, base, lora = config.optimizer.name, config.model.base, config.model.lora
    if lora is not None and needs_delta(config.optimizer) and lora.adapter is None:
        raise UserError(
            f"model.lora.adapter is not set; {name} merges adapters with those of the reference, and "
            "fresh ones hold nothing. Give the adapter of the SFT model, or train all weights."
        )
    if lora is not None and base is not None:
        raise UserError(
            f"model.base is set to {base!r}, but with model.lora the delta is that of the adapters, "
            "whose base has none. Unset it."
        )
    if lora is None and base is None and needs_delta(config.optimizer):
        raise UserError(
            f"model.base is not set; {name} merges with the delta between model.path and the "
            "pre-trained model it was fine-tuned from. Give that model's directory."
        )
    if base is not None and not takes_delta(config.optimizer):
        raise UserError(
            f"model.base is set to {base!r}, but {name} has no use for it. Unset it, or choose a "
            "merging optimizer.name."
        )
    with blamed_on("loss"):
        loss = config.loss
        pair_loss(loss.type, beta=loss.beta, label_smoothing=loss.label_smoothing)


class _Alignment:
    """The weights' way through a run: loaded once, let go as soon as the state exists."""

    def __init__(self, config: DPOConfig, this: Run, model_hash: str) -> None:
        self.config, self.run, self.model_hash = config, this, model_hash
        self.tx = make_optimizer(
            config.optimizer, this.schedule, layer_axes=layer_axes, steps=this.steps
        )
        self.score = make_score(this.graphdef, vocab_chunk=config.loss.vocab_chunk)
        self.loaded: Params | None = None
        self.frozen: Params | None = None

    def train(self) -> None:
        loss, this = self.config.loss, self.run
        settings: dict[str, Any] = {
            "loss_type": loss.type,
            "beta": loss.beta,
            "label_smoothing": loss.label_smoothing,
        }
        synced = self.config.sync_ref_model
        data = this.data if synced else self._with_reference(this.data)
        evaluate = None
        if this.held_out is not None:
            evaluate = evaluate_preferences(
                self.score,
                self._with_reference(this.held_out),
                batch_size=this.eval_batch_size,
                mesh=this.mesh,
                **settings,
            )
        if this.resumes:
            # Nothing will ask for the weights that scored the reference: the state is restored.
            self.loaded = None
        this.train(
            preference_loss(this.graphdef, vocab_chunk=loss.vocab_chunk, **settings),
            self.tx,
            self._start,
            like=jax.eval_shape(self._make_state, this.trained_shapes, self._delta_shapes()),
            data=data,
            evaluate=evaluate,
            check_first=self._check_first,
            frozen=self._frozen,
            reference_columns=self._reference_columns if synced else None,
        )

    def _reference_columns(self, params: Params, batch: Batch) -> Batch:
        chosen, rejected = self.score(params, batch)
        return {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}

    def _frozen(self) -> Params:
        if self.frozen is None:
            frozen = self.run.split(self.run.shapes)[1]
            self.frozen = self.run.split(self._params())[1] if frozen else {}
            self.loaded = None
        return self.frozen

    def _params(self) -> Params:
        if self.loaded is None:
            self.run.console.print("Loading the model ...")
            self.loaded = self.run.load_start()
        return self.loaded

    def _with_reference(self, dataset: TokenDataset) -> TokenDataset:
        model = self.config.model
        cache = self.config.reference_cache
        directory = self.run.output.path / "reference" if cache is None else Path(cache)
        dtypes = [model.dtype, model.param_dtype]

        def compute(dataset: TokenDataset) -> Scores:
            return pair_logps(
                self.score,
                self._params(),
                dataset,
                self.run.eval_batch_size,
                self.run.mesh,
                shown_as=f"reference log-probabilities of {len(dataset)} pairs",
            )

        return with_reference(
            dataset, cache_file(directory, self.model_hash, dataset, dtypes), compute
        )

    def _make_state(self, params: Params, delta: Params | None) -> State:
        return init_state(params, self.tx, delta, self.run.followers)

    def _delta_of(self, params: Params, base: Params) -> Params:
        return om.task_vector(params, base, dtype=self.config.optimizer.delta_dtype)

    def _delta_and_size(self, params: Params, base: Params) -> tuple[Params, jax.Array]:
        delta = self._delta_of(params, base)
        return delta, optax.tree.norm(delta) / optax.tree.norm(params)

    def _delta_shapes(self) -> Params | None:
        if not needs_delta(self.config.optimizer):
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
        delta = None
        if needs_delta(self.config.optimizer):
            base = self._base_of(params)
            delta, size = jax.jit(self._delta_and_size)(params, base)
            del base
            if size == 0:
                # The same weights in other files, or a difference that the types have no room for.
                types = [self.config.model.param_dtype, self.config.optimizer.delta_dtype]
                raise _no_delta(f" in {' and '.join(dict.fromkeys(filter(None, types)))}")
            self.run.console.print(f"Reference delta: {size:.3g} of the norm of the weights.")
        self.loaded, self.frozen = None, frozen
        return self._make_state(params, delta)

    def _check_first(self, metrics: Mapping[str, float]) -> None:
        loss = self.config.loss
        with blamed_on("reference"):
            check_starts_at_reference(metrics, loss_type=loss.type, beta=loss.beta)
