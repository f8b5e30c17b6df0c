"""What SFT and preference training share: the checks before, and the steps around the loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from train.commands.generate import end_tokens
from train.config import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    SFTConfig,
    UserError,
    check_settings,
)
from train.data import TokenDataset, make_buckets, make_loader
from train.distributed.mesh import (
    Params,
    abstract_model,
    check_batch,
    compiler_options,
    make_mesh,
    row_parts,
)
from train.distributed.processes import is_first, largest
from train.evaluation.held_out import Evaluate
from train.evaluation.tasks import Tasks, as_metrics, read_tasks, task_scorer
from train.files.lock import release
from train.files.run_directory import OutputDir, open_output
from train.inputs.model import (
    Tokenize,
    blamed_on,
    check_model,
    check_related,
    load_data,
    load_tokenizer,
)
from train.models import ModelConfig, from_hf, split_model
from train.models.lora import fresh_adapters, is_adapter, read_adapters
from train.models.trainable import Trained, choose, join, leaf_paths, split
from train.optimizers.alpha import alpha_scale_of
from train.optimizers.check import check_optimizer
from train.optimizers.schedules import learning_rates, make_schedule
from train.runs.counts import check_rows, count_steps
from train.runs.dry_run import check_length, dry_run
from train.runs.export import export_run, exported_weights
from train.runs.summary import show_summary, summarise
from train.training.averages import Followers
from train.training.checkpoint import Checkpoints, abstract, restore_params
from train.training.loop import Job, Loader, Prepared, fit
from train.training.step import Batch, LossFn, State, make_train_step, state_shardings
from train.training.watch import step_to_export

Config = SFTConfig | DPOConfig | KTOConfig | OnlineDPOConfig | GRPOConfig
Arrange = Callable[
    [TokenDataset, TokenDataset | None, Console], tuple[TokenDataset, TokenDataset | None]
]


@dataclass(frozen=True)
class Run:
    """A run whose settings, model directory and data have been checked; no weight is read yet.

    Attributes:
        config: The settings.
        output: Its directory.
        console: Where progress is shown.
        model: The model's configuration, with the types of this run.
        graphdef: The model's structure.
        shapes: Its parameters as `jax.ShapeDtypeStruct`, with their places.
        data: Training rows.
        held_out: Held-out rows, if any.
        steps: Number of updates.
        schedule: Learning rate.
        mesh: Devices, None for a single one.
        trained: Test of a parameter's path.
        tokenizer: The model's.
        tasks: What else is scored at every evaluation.
    """

    config: Config
    output: OutputDir
    console: Console
    model: ModelConfig
    graphdef: nnx.GraphDef
    shapes: Params
    data: TokenDataset
    held_out: TokenDataset | None
    steps: int
    schedule: optax.Schedule
    mesh: Mesh | None
    trained: Trained
    tokenizer: Any
    tasks: Tasks

    @property
    def trained_shapes(self) -> Params:
        """The part of `shapes` that is trained."""
        return self.split(self.shapes)[0]

    def split(self, params: Params) -> tuple[Params, Params]:
        """Parameters, or their shapes, that are trained, and the others."""
        return split(params, self.trained)

    @property
    def followers(self) -> Followers:
        """Copies of the parameters that the state holds."""
        config, ema = self.config, self.config.trainer.ema
        mixup = None
        if isinstance(config, DPOConfig) and config.sync_ref_model:
            mixup = config.ref_model_mixup_alpha
        return Followers(
            ema_decay=None if ema is None else ema.decay,
            mixup_alpha=mixup,
            sync_steps=getattr(config, "ref_model_sync_steps", 1),
        )

    @property
    def eval_batch_size(self) -> int:
        """Rows in an evaluation batch."""
        return self.config.trainer.eval_batch_size or self.config.trainer.batch_size

    @property
    def resumes(self) -> bool:
        """Whether training goes on from a checkpoint."""
        if not self.output.checkpoints.is_dir():
            return False
        with Checkpoints(self.output.checkpoints, read_only=True) as saved:
            return saved.latest() is not None

    def begin(self, **inputs: str) -> None:
        """Claims the output directory; `inputs` are content hashes besides those of the data."""
        held_out = {} if self.held_out is None else {"held_out": self.held_out.fingerprint()}
        if self.tasks:
            held_out["tasks"] = self.tasks.fingerprint()
        inputs = {**inputs, "data": self.data.fingerprint(), **held_out}
        aside = self.output.begin(self.config, inputs)
        if aside is not None:
            self.console.print(
                f"Another run ended here before its first checkpoint; its records are in {aside}.",
                highlight=False,
                soft_wrap=True,
            )

    def load(self, path: str, name: str) -> Params:
        """Parameters of a model directory, in the types and places of this run."""
        with blamed_on(name):
            model = from_hf(
                path, dtype=self.model.dtype, param_dtype=self.model.param_dtype, mesh=self.mesh
            )
        return split_model(model)[1]

    def load_start(self) -> Params:
        """All parameters that training starts from, adapters included."""
        options = self.config.model
        params, lora = self.load(options.path, "model.path"), options.lora
        if lora is None:
            return params
        if lora.adapter is None:
            adapters = fresh_adapters(self.model, lora.seed)
        else:
            with blamed_on("model.lora.adapter"):
                adapters = read_adapters(lora.adapter, self.model)
        places = jax.tree.map(lambda leaf: leaf.sharding, split(self.shapes, is_adapter)[0])
        return join(params, jax.device_put(adapters, places))

    def train(
        self,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        start: Callable[[], State],
        *,
        like: State,
        data: TokenDataset,
        evaluate: Evaluate | None,
        check_first: Callable[[Mapping[str, float]], None] | None = None,
        frozen: Callable[[], Params],
        models: Callable[[], dict[str, Params]] = dict,
        reference_columns: Callable[[Params, Batch], Batch] | None = None,
        shuffle: bool = True,
        prepare: Callable[[Params, Batch, int], Prepared] | None = None,
    ) -> None:
        """Trains, exports the model and reports.

        Args:
            loss_fn: From `train.objectives.preference`.
            tx: The optimizer.
            start: Makes the state of a new run.
            like: What `start` makes, from `jax.eval_shape`.
            data: Training rows with all the columns that the loss reads.
            evaluate: Held-out metrics.
            check_first: See `train.training.loop.Job`.
            frozen: The parameters that are not trained; asked for once the state is there.
            models: What the optimizer's updates are given besides, see
                `train.training.step.make_train_step`; likewise.
            reference_columns: See `train.training.step.make_train_step`.
            shuffle: Draw a new order of the rows in every epoch.
            prepare: Makes the batch of a step of the loader's, given all parameters before it and
                the number of steps done, and what is logged of it.

        Raises:
            Stopped: by a signal; the run is saved.
            UserError: training ended, and said why; nothing is exported.
        """
        trainer = self.config.trainer
        held, given = functools.cache(frozen), functools.cache(models)
        on_host = self.config.optimizer.delta_storage == "pinned_host"
        shardings = state_shardings(like, self.trained_shapes, delta_on_host=on_host)
        step = make_train_step(
            loss_fn,
            tx,
            shardings=shardings,
            accumulate=trainer.gradient_accumulation_steps,
            followers=self.followers,
            reference_columns=reference_columns,
            alpha_scale=alpha_scale_of(self.config.optimizer),
            compiler_options=compiler_options(self.mesh),
        )

        measure = self._with_tasks(evaluate)

        def evaluate_trained(params: Params) -> dict[str, float]:
            assert measure is not None
            return measure(join(params, held()))

        def prepare_batch(state: State, batch: Batch, done: int) -> Prepared:
            assert prepare is not None
            return prepare(join(state["params"], held()), batch, done)

        job = Job(
            start=start,
            like=abstract(like, shardings),
            step=lambda state, batch: step(state, batch, held(), given()),
            loader=self._loader(data, shuffle),
            evaluate=None if measure is None else evaluate_trained,
            check_first=check_first,
            learning_rates=learning_rates(self.schedule, self.steps),
            mesh=self.mesh,
            prepare=None if prepare is None else prepare_batch,
            steps_per_batch=self.config.steps_per_batch,
            evaluated="ema" if trainer.ema is not None and trainer.ema.evaluate else "params",
        )
        try:
            state = fit(job, trainer, self.output, self.console)
            number, weights = self._to_export(state, job.like)
            export_run(self.output, self.config.model, self.model, join(weights, held()), number)
            if is_first():
                summary = summarise(self.output, exported=number)
                self.output.finish(summary)
                show_summary(summary, self.console)
        finally:
            release(self.output.path)

    def _with_tasks(self, evaluate: Evaluate | None) -> Evaluate | None:
        """An evaluation of held-out rows, if any, and of the tasks, if any."""
        if not self.tasks:
            return evaluate
        scores = task_scorer(
            self.graphdef,
            self.tasks,
            self.tokenizer,
            end_tokens(self.config.model.path, self.tokenizer),
            batch_size=self.eval_batch_size,
            mesh=self.mesh,
        )

        def measure(params: Params) -> dict[str, float]:
            return ({} if evaluate is None else evaluate(params)) | as_metrics(scores(params))

        return measure

    def _loader(self, data: TokenDataset, shuffle: bool) -> Loader:
        trainer, buckets = self.config.trainer, None
        if shuffle:
            count = self.config.data.buckets
            batches = self.steps // self.config.steps_per_batch
            buckets = make_buckets(data, trainer.batch_size, count, steps=batches)
            self.console.print(f"Batches: {buckets.describe(data.arrays)}", highlight=False)
        return make_loader(
            data,
            trainer.batch_size,
            seed=trainer.seed,
            shuffle=shuffle,
            shard=row_parts(self.mesh),
            buckets=buckets,
        )

    def _to_export(self, state: State, like: State) -> tuple[int, Params]:
        """The step and the trained weights that the settings choose: the last ones or the best."""
        trainer, last = self.config.trainer, int(state["step"])
        name = exported_weights(trainer)
        by, log = trainer.export_best, self.output.path / "metrics.jsonl"
        # Of the first process, which wrote the file; the others may not see the end of it yet.
        step = largest(step_to_export(trainer, log, last) if is_first() else 0)
        if step == last:
            return last, state[name]
        with Checkpoints(self.output.checkpoints, read_only=True) as saved:
            damage = saved.damage(step)
        if damage is not None:
            raise UserError(
                f"the checkpoint of step {step}, which is to be exported, is damaged ({damage}). "
                "`python -m train export` with another --step writes another one."
            )
        chosen = f"Best by {by}" if by is not None else "Last evaluation within the floors"
        self.console.print(f"{chosen}: step {step}.", highlight=False)
        return step, restore_params(self.output.checkpoints, step, like[name], name)


def set_up(
    command: str,
    config: Config,
    tokenize: Tokenize,
    arrange: Arrange | None = None,
) -> Run | None:
    """Checks everything that can be checked without weights.

    Args:
        command: "sft", "dpo", "kto", "online-dpo" or "grpo".
        config: The settings.
        tokenize: Makes rows of records.
        arrange: Orders and completes the training and the held-out rows.

    Returns:
        The run, or None when there is none to make: after a dry run, and when the output directory
        holds it already finished, which is said.

    Raises:
        UserError: something given cannot be used.
    """
    console = Console(quiet=not is_first())
    check_settings(config)
    check_optimizer(config.optimizer)
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
    if config.dry_run:
        dry_run(config, tokenize, console)
        return None
    model = check_model(config.model)
    check_length(config, model)
    tokenizer = load_tokenizer(config.model.path, "model.path")
    base = getattr(config.model, "base", None)
    if base is not None:
        check_related(base, config.model.path, "model.base")
    mesh = make_mesh(config.mesh)
    check_rows(config, mesh)
    if config.trainer.eval_batch_size is not None:
        check_batch("trainer.eval_batch_size", config.trainer.eval_batch_size, mesh)
    graphdef, shapes = abstract_model(model, mesh)
    trained = choose(config.model, leaf_paths(shapes))
    data, held_out = load_data(config.records, tokenize, tokenizer, console)
    tasks = read_tasks(
        config.evaluation, tokenizer, model.max_position_embeddings, console, "evaluation."
    )
    if arrange is not None:
        data, held_out = arrange(data, held_out, console)
    steps = count_steps(config.trainer, data.rows_per_epoch, config.steps_per_batch)
    return Run(
        config=config,
        output=output,
        console=console,
        model=model,
        graphdef=graphdef,
        shapes=shapes,
        data=data,
        held_out=held_out,
        steps=steps,
        schedule=make_schedule(config.schedule, config.optimizer.learning_rate, steps),
        mesh=mesh,
        trained=trained,
        tokenizer=tokenizer,
        tasks=tasks,
    )
