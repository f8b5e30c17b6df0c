"""The true DPO step of a configuration, with abstract arrays in place of weights and batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

import omerge_jax as om
from train.config import DPOConfig, UserError
from train.data.buckets import LEAST_SHARED
from train.distributed.batches import batch_sharding, check_batch
from train.distributed.mesh import compiler_options
from train.inputs.model import with_types
from train.losses import PreferenceLoss
from train.losses.options import beta_from, loss_from
from train.models import ModelConfig, layer_axes, read_hf_config
from train.models.abstract import abstract_model
from train.objectives.preference import preference_loss
from train.optimizers.alpha import alpha_scale_of
from train.optimizers.build import make_optimizer
from train.optimizers.schedules import make_schedule
from train.training.checkpoint import abstract
from train.training.step import init_state, make_train_step, state_shardings

SHAPES = Path(__file__).parent / "shapes"


class Program(NamedTuple):
    """A step that can be lowered; its arguments have `jax.ShapeDtypeStruct` leaves with shardings.

    `models` has the weights of reference and base, where a merge recomputes its delta.
    """

    step: Any  # from `train.training.step.make_train_step`
    state: Any
    batch: Any
    models: dict[str, Any]

    def lower(self) -> Any:
        """The step as `train.commands.dpo` calls it, lowered."""
        return self.step.lower(self.state, self.batch, {}, self.models)


def read_shape(path: str) -> ModelConfig:
    """The model of a directory with a ``config.json``, or of ``train/plan/shapes/<path>.json``.

    Raises `UserError` where there is neither, or the decoder does not support the model.
    """
    shape = SHAPES / f"{path}.json"
    try:
        known = json.loads(shape.read_text(encoding="utf-8")) if shape.is_file() else None
        return ModelConfig.from_hf(read_hf_config(path) if known is None else known)
    except FileNotFoundError as error:
        names = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
        raise UserError(
            f"model.path: {error}. plan needs nothing else of the model; or name one of {names}."
        ) from error
    except ValueError as error:
        raise UserError(f"model.path: {error}") from error


def make_program(
    config: DPOConfig, model: ModelConfig, mesh: Mesh | AbstractMesh | None
) -> Program:
    """Builds the step that `train.commands.dpo` runs; nothing is allocated.

    Raises `UserError` where the batch cannot be split over the mesh, or the run trains a part of the
    model or holds copies of it, whose steps are not built here.
    """
    _check_whole(config)
    trainer = config.trainer
    parts = trainer.gradient_accumulation_steps
    check_batch("trainer.batch_size", trainer.batch_size, mesh, parts)
    graphdef, params = abstract_model(with_types(model, config.model), mesh)
    steps = trainer.steps or 1000  # changes constants of the schedules alone
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, steps)
    tx = make_optimizer(config.optimizer, schedule, layer_axes=layer_axes, steps=steps)
    delta, on_host = None, config.optimizer.delta_storage == "pinned_host"
    if config.optimizer.holds_delta:
        dtype = config.optimizer.delta_dtype
        delta = jax.eval_shape(lambda a, b: om.task_vector(a, b, dtype=dtype), params, params)
    state = jax.eval_shape(lambda p, d: init_state(p, tx, d), params, delta)
    shardings = state_shardings(state, params, delta_on_host=on_host)
    if shardings is not None:
        state = abstract(state, shardings)
    loss = loss_from(PreferenceLoss, config.loss)
    beta_at, chunk = beta_from(config.loss, steps), config.loss.vocab_chunk
    loss_fn = preference_loss(graphdef, loss, beta_at=beta_at, vocab_chunk=chunk)
    step = make_train_step(
        loss_fn,
        tx,
        shardings=shardings,
        microbatches=parts,
        alpha_scale=alpha_scale_of(config.optimizer),
        compiler_options=compiler_options(mesh),
    )
    recomputes = config.optimizer.delta_storage == "recompute"
    given = ("reference_params", "base_params") if recomputes else ()
    return Program(step, state, _batch(config, loss, mesh), dict.fromkeys(given, params))


def _check_whole(config: DPOConfig) -> None:
    given = {
        "model.lora": config.model.lora,
        "model.freeze": config.model.freeze,
        "model.trainable": config.model.trainable,
        "trainer.ema": config.trainer.ema,
        "sync_ref_model": config.sync_ref_model,
    }
    for name, value in given.items():
        if value:
            raise UserError(
                f"{name} is set; the plan covers runs that train all parameters and hold no copies of "
                "them. Unset it."
            )


def _batch(
    config: DPOConfig, loss: PreferenceLoss, mesh: Mesh | AbstractMesh | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The longest rows that the data settings allow, as `train.data.loader` batches them."""
    place = None if mesh is None else batch_sharding(mesh)
    size, data = config.trainer.batch_size, config.data
    prompt, answer = data.max_prompt_length, data.max_completion_length
    columns: dict[str, tuple[tuple[int, ...], Any]] = {"index": ((), jnp.int32)}
    for name, length in {"prompt": prompt, "chosen": answer, "rejected": answer}.items():
        columns[f"{name}_tokens"] = (length,), jnp.int32
        columns[f"{name}_mask"] = (length,), jnp.bool_
    if shares_prompts(config):
        for name in ("joined_ids", "joined_parts"):
            columns[name] = (prompt + 2 * answer,), jnp.int32
        for name in ("scored_ids", "scored_from"):
            columns[name] = (2 * answer,), jnp.int32
    if loss.needs_reference:
        for name in ("reference_chosen_logps", "reference_rejected_logps"):
            columns[name] = (), jnp.float32
    return {
        name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=place)
        for name, (shape, dtype) in columns.items()
    }


def shares_prompts(config: DPOConfig) -> bool:
    """Whether rows hold their prompt once for both answers, when all are as long as they may be."""
    data = config.data
    if isinstance(data.prefix_sharing, bool):
        return data.prefix_sharing
    tokens = 2 * (data.max_prompt_length + data.max_completion_length)
    return data.max_prompt_length >= LEAST_SHARED * tokens
