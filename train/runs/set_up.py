"""Checks everything that can be checked without weights, for a run and for a dry run alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from train.config import (
    GRPOConfig,
    OnlineDPOConfig,
    SFTConfig,
    TrainerOptions,
    UserError,
    check_settings,
)
from train.data import TokenDataset
from train.distributed.batches import check_batch
from train.distributed.mesh import make_mesh
from train.distributed.processes import is_first
from train.evaluation.tasks import read_tasks
from train.files.run_directory import OutputDir, open_output
from train.inputs.model import check_model, check_related, load_tokenizer
from train.inputs.records import Tokenize, load_data
from train.models import ModelConfig, layer_axes
from train.models.abstract import abstract_model
from train.models.trainable import choose, leaf_paths
from train.optimizers.build import make_optimizer
from train.optimizers.check import check_optimizer
from train.optimizers.schedules import make_schedule
from train.runs.dry_run import describe_models, show_data, show_run
from train.runs.run import Config, Run
from train.runs.summary import show_summary

Arrange = Callable[
    [TokenDataset, TokenDataset | None, Console], tuple[TokenDataset, TokenDataset | None]
]


def check_config(config: Config) -> None:
    """Checks what needs no file: ranges, the optimizer, and the models that it merges.

    Raises `UserError`, which names the first field that cannot be used.
    """
    check_settings(config)
    check_optimizer(config.optimizer)
    if not isinstance(config, SFTConfig):
        _check_merge(config)


def set_up(
    command: str, config: Config, tokenize: Tokenize, arrange: Arrange | None = None
) -> Run | None:
    """Checks the model, the mesh and the data; a dry run shows what was found.

    `check_config` accepts the settings, `tokenize` makes rows of records, and `arrange` orders and
    completes the training and the held-out rows. Returns None when there is no run to make: after a
    dry run, and when the output directory holds the run already finished, which is said. Raises
    `UserError` where something given cannot be used.
    """
    console = Console(quiet=not is_first())
    output = open_output(command, config)
    if config.model.param_dtype == "bfloat16" and config.optimizer.update_rounding == "nearest":
        console.print(
            "Warning: model.param_dtype bfloat16 loses small updates to rounding; with "
            "optimizer.rounding stochastic or compensated they arrive.",
            highlight=False,
            soft_wrap=True,
        )
    if output.summary is not None:
        console.print(f"{output.path} holds this run, finished: nothing to do.", soft_wrap=True)
        show_summary(output.summary, console)
        return None
    run = _checked_run(config, output, console, tokenize, arrange)
    return None if config.dry_run else run


def _checked_run(
    config: Config,
    output: OutputDir,
    console: Console,
    tokenize: Tokenize,
    arrange: Arrange | None,
) -> Run:
    """Checks the model, the mesh and the data, in the order of their cost."""
    model, tokenizer = describe_models(config, console) if config.dry_run else _models(config)
    _check_length(config, model)
    mesh = make_mesh(config.mesh)
    _check_rows(config, mesh)
    graphdef, shapes = abstract_model(model, mesh)
    trained = choose(config.model, leaf_paths(shapes))
    examples, held_out = load_data(config.records, tokenize, tokenizer, console)
    tasks = read_tasks(
        config.evaluation, tokenizer, model.max_position_embeddings, console, "evaluation."
    )
    if config.dry_run:
        show_data(examples, console)
    data = examples
    if arrange is not None:
        data, held_out = arrange(data, held_out, console)
    steps = count_steps(config.trainer, data.rows_per_epoch, config.steps_per_batch)
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, steps)
    run = Run(
        config=config,
        output=output,
        console=console,
        model=model,
        graphdef=graphdef,
        shapes=shapes,
        trained=trained,
        tokenizer=tokenizer,
        data=data,
        held_out=held_out,
        tasks=tasks,
        steps=steps,
        schedule=schedule,
        optimizer=make_optimizer(config.optimizer, schedule, layer_axes=layer_axes, steps=steps),
        mesh=mesh,
    )
    if config.dry_run:
        show_run(run, examples)
    return run


def _models(config: Config) -> tuple[ModelConfig, Any]:
    """Reads the model's configuration and its tokenizer, after a look at the headers of all weights."""
    model = check_model(config.model)
    tokenizer = load_tokenizer(config.model.path, "model.path")
    base = getattr(config.model, "base", None)
    if base is not None:
        check_related(base, config.model.path, "model.base")
    return model, tokenizer


def _check_merge(config: Any) -> None:
    """Raises `UserError` where a base model or an adapter to merge is missing, or of no use."""
    name, base, lora = config.optimizer.name, config.model.base, config.model.lora
    if lora is not None and config.optimizer.delta_storage is not None and lora.adapter is None:
        raise UserError(
            f"model.lora.adapter is not set; {name} merges adapters with those of the reference, and "
            "fresh ones hold nothing. Give the adapter of the SFT model, or train all weights."
        )
    if lora is not None and base is not None:
        raise UserError(
            f"model.base is set to {base!r}, but with model.lora the delta is that of the adapters, "
            "whose base has none. Unset it."
        )
    if lora is None and base is None and config.optimizer.delta_storage is not None:
        raise UserError(
            f"model.base is not set; {name} merges with the delta between model.path and the "
            "pre-trained model it was fine-tuned from. Give that model's directory."
        )
    if base is not None and config.optimizer.alpha is None:
        raise UserError(
            f"model.base is set to {base!r}, but {name} has no use for it. Unset it, or choose a "
            "merging optimizer.name."
        )


def _check_length(config: Config, model: ModelConfig) -> None:
    """Raises `UserError` where rows may be longer than the model's positions reach."""
    records, sampled = config.records, isinstance(config, OnlineDPOConfig | GRPOConfig)
    length = records.max_prompt_length + records.max_completion_length
    if length > model.max_position_embeddings:
        answers = "sampling.max_new_tokens" if sampled else "data.max_completion_length"
        raise UserError(
            f"data.max_prompt_length + {answers} is {length}, but the model has "
            f"{model.max_position_embeddings} positions."
        )


def _check_rows(config: Config, mesh: Mesh | None) -> None:
    """Raises `UserError` where a batch cannot be split over the mesh, or into its parts."""
    trainer, parts = config.trainer, config.trainer.gradient_accumulation_steps
    if isinstance(config, GRPOConfig):
        check_batch("trainer.batch_size", trainer.batch_size, mesh)
        answers = trainer.batch_size * config.sampling.num_generations
        check_batch("trainer.batch_size * sampling.num_generations", answers, mesh, parts)
    else:
        check_batch("trainer.batch_size", trainer.batch_size, mesh, parts)
    if trainer.eval_batch_size is not None:
        check_batch("trainer.eval_batch_size", trainer.eval_batch_size, mesh)


def count_steps(options: TrainerOptions, rows: int, per_batch: int = 1) -> int:
    """Counts the updates, `per_batch` on every batch, where an epoch has so many `rows`.

    Raises `UserError` where there are fewer rows than a batch has, or less than one step results.
    """
    if options.batch_size > rows:
        raise UserError(
            f"trainer.batch_size is {options.batch_size}, but there are only {rows} training rows; "
            "use a smaller batch or more data."
        )
    if options.steps is not None:
        return options.steps
    assert options.epochs is not None
    steps = round(options.epochs * (rows // options.batch_size)) * per_batch
    if steps < 1:
        raise UserError(f"trainer.epochs {options.epochs} makes no step of {rows} rows.")
    return steps
