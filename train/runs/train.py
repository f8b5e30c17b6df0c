"""Trains a checked run. Used by fine-tuning and by every alignment command.

`train.runs.start_weights` loads the weights; `train.training.loop` runs the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train.config import UserError
from train.data import TokenDataset, make_loader
from train.distributed.batches import row_parts
from train.distributed.mesh import compiler_options, on_mesh
from train.distributed.processes import is_first
from train.evaluation.held_out import answer_logps
from train.evaluation.tasks import as_metrics, task_scorer
from train.files.lock import release
from train.inputs.model import blamed_on
from train.models.model_dir import end_tokens
from train.models.trainable import join
from train.optimizers.alpha import alpha_scale_of
from train.optimizers.schedules import learning_rates
from train.runs.export import export_run
from train.runs.reference import Scores, cache_file, with_reference
from train.runs.run import Run
from train.runs.start_weights import StartWeights, hash_weights
from train.runs.summary import show_summary, summarise
from train.training.checkpoint import Checkpoints, abstract, restore_params
from train.training.loop import Job, fit
from train.training.step import make_train_step, state_shardings
from train.types import Batch, Evaluate, LossFn, Params, Prepared, Score, State


@dataclass(frozen=True)
class Objective:
    """The parts of a run in which one kind of training differs from another.

    Attributes:
        loss_fn: The loss, from `train.objectives`.
        evaluate: Makes the evaluation of held-out rows with the reference log-probabilities added.
        score: Computes the log-probabilities of answers, with the weights of the reference.
        names: Names of the answers that `score` returns, such as chosen and rejected; none where the
            loss needs no reference.
        depends_on: Settings that change what `score` returns.
        check_first: Raises `ValueError` when the metrics of step 1 of a new run are impossible.
        shuffle: Whether every epoch draws a new order.
        synced: Whether the reference follows the policy and is scored at every step.
        sample: `f(policy, reference, batch, done)` samples answers to the loader's prompts and returns
            the batch and its metrics. It gets all parameters of both models and the number of steps
            done. The reference is the starting model, and None where `names` is empty.
        inputs: Content hashes of what else the run reads, by name.
    """

    loss_fn: LossFn
    evaluate: Callable[[TokenDataset], Evaluate]
    score: Score | None = None
    names: tuple[str, ...] = ()
    depends_on: tuple[str | float, ...] = ()
    check_first: Callable[[Mapping[str, float]], None] | None = None
    shuffle: bool = True
    synced: bool = False
    sample: Callable[[Params, Params | None, Batch, int], Prepared] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    def reference_columns(self, params: Params, batch: Batch) -> Batch:
        """Computes the reference's log-probabilities of a batch, by the names that the loss reads."""
        assert self.score is not None
        names = [f"reference_{name}_logps" for name in self.names]
        return dict(zip(names, self.score(params, batch), strict=True))


def train(run: Run, objective: Objective) -> None:
    """Trains from the start or from the last checkpoint, exports the model and reports.

    Raises:
        Stopped: a signal came; the run is saved.
        UserError: base and model are the same, which is found before training starts; or training
            ended for a reason that the message gives, and nothing is exported.
    """
    hashes = hash_weights(run.config.model)
    scores_answers = objective.sample is not None and bool(objective.names)
    weights = StartWeights(run, scores_answers=scores_answers)
    run.begin({**hashes, **objective.inputs})
    try:
        with on_mesh(run.mesh):
            data, held_out = run.data, run.held_out
            if objective.names and objective.sample is None:
                key = hashes["model"] + hashes.get("adapter", "")
                if not objective.synced:
                    data = _with_reference(run, objective, weights, data, key)
                if held_out is not None:
                    held_out = _with_reference(run, objective, weights, held_out, key)
            evaluate = _with_tasks(run, None if held_out is None else objective.evaluate(held_out))
            if run.resumes:
                weights.resume()
            job = _job(run, objective, weights, data, evaluate)
            state, step = fit(job, run.config.trainer, run.output, run.console)
            params = join(_weights_of(run, step, state, job.like), weights.frozen)
            export_run(run.output, run.config.model, run.model, params, step)
            if is_first():
                summary = summarise(run.output, exported=step)
                run.output.finish(summary)
                show_summary(summary, run.console)
    finally:
        release(run.output.path)


def _job(
    run: Run,
    objective: Objective,
    weights: StartWeights,
    data: TokenDataset,
    evaluate: Evaluate | None,
) -> Job:
    """Puts together what the loop calls: a step, batches, and held-out metrics."""
    config, trainer = run.config, run.config.trainer
    sample, check_first = objective.sample, objective.check_first
    like, on_host = weights.abstract_state(), config.optimizer.delta_storage == "pinned_host"
    shardings = state_shardings(like, run.trained_shapes, delta_on_host=on_host)
    step = make_train_step(
        objective.loss_fn,
        run.optimizer,
        shardings=shardings,
        microbatches=trainer.gradient_accumulation_steps,
        averages=run.averages,
        reference_columns=objective.reference_columns if objective.synced else None,
        alpha_scale=alpha_scale_of(config.optimizer),
        compiler_options=compiler_options(run.mesh),
    )
    evaluated = "ema" if trainer.ema is not None and trainer.ema.evaluate else "params"

    def all_params(state: State, name: str = "params") -> Params:
        return join(state[name], weights.frozen)

    return Job(
        start=weights.start,
        like=abstract(like, shardings),
        step=lambda state, batch: step(state, batch, weights.frozen, weights.merged_models),
        loader=make_loader(
            data,
            trainer.batch_size,
            seed=trainer.seed,
            shuffle=objective.shuffle,
            shard=row_parts(run.mesh),
            buckets=run.show_buckets() if objective.shuffle else None,
        ),
        evaluate=None if evaluate is None else lambda state: evaluate(all_params(state, evaluated)),
        check_first=None if check_first is None else blamed_on("reference")(check_first),
        learning_rates=learning_rates(run.schedule, run.steps),
        mesh=run.mesh,
        prepare=None
        if sample is None
        else lambda state, batch, done: sample(
            all_params(state), weights.whole_reference, batch, done
        ),
        steps_per_batch=config.steps_per_batch,
    )


def _with_reference(
    run: Run, objective: Objective, weights: StartWeights, dataset: TokenDataset, key: str
) -> TokenDataset:
    """Adds the reference's log-probabilities to a data set, from the cache where it has them."""
    model = run.config.model
    cache = getattr(run.config, "reference_cache", None)
    directory = run.output.path / "reference" if cache is None else Path(cache)
    computation = [model.dtype, model.param_dtype, *objective.depends_on]

    def compute(dataset: TokenDataset) -> Scores:
        assert objective.score is not None
        logps = answer_logps(
            objective.score,
            weights.load(),
            dataset,
            run.eval_batch_size,
            run.mesh,
            shown_as=f"reference log-probabilities of {len(dataset)} rows",
        )
        return dict(zip(objective.names, logps, strict=True))

    file = cache_file(directory, key, dataset, computation)
    return with_reference(dataset, file, objective.names, compute)


def _with_tasks(run: Run, evaluate: Evaluate | None) -> Evaluate | None:
    """Adds the tasks, if there are any, to the evaluation of held-out rows, if there are any."""
    if not run.tasks:
        return evaluate
    ends = end_tokens(run.config.model.path, run.tokenizer)
    batch_size, mesh = run.eval_batch_size, run.mesh
    scores = task_scorer(
        run.graphdef, run.tasks, run.tokenizer, ends, batch_size=batch_size, mesh=mesh
    )
    held_out: Evaluate = evaluate or (lambda params: {})
    return lambda params: held_out(params) | as_metrics(scores(params))


def _weights_of(run: Run, step: int, state: State, like: State) -> Params:
    """Returns the trained weights of a step, or their average where the settings say so."""
    ema, by = run.config.trainer.ema, run.config.trainer.export_best
    name = "ema" if ema is not None and ema.export else "params"
    if step == int(state["step"]):
        return state[name]
    with Checkpoints(run.output.checkpoints, read_only=True) as saved:
        damage = saved.damage(step)
    if damage is not None:
        raise UserError(
            f"the checkpoint of step {step}, which is to be exported, is damaged ({damage}). "
            "`python -m train export` with another --step writes another one."
        )
    chosen = f"Best by {by}" if by is not None else "Last evaluation within the floors"
    run.console.print(f"{chosen}: step {step}.", highlight=False)
    return restore_params(run.output.checkpoints, step, like[name], name)
