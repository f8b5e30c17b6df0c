"""``python -m train eval``: what a model prefers and what it still knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from train.config import EvalConfig, ModelOptions, PreferenceEvalOptions, UserError, check_settings
from train.data import TokenDataset, tokenize_preference
from train.evaluation.held_out import answer_logps, evaluate_preferences
from train.evaluation.tasks import Tasks, read_tasks, task_scorer
from train.files.whole import check_new_file, write_json
from train.inputs.model import blamed_on, check_model, check_related, load_tokenizer
from train.inputs.records import sharing_prompts, split_records, tokenized
from train.losses import PreferenceLoss
from train.models import from_hf, split_model
from train.models.abstract import abstract_model
from train.models.model_dir import end_tokens
from train.objectives.preference import reference_logps_fn
from train.types import Score

Results = dict[str, Any]


def evaluate_model(config: EvalConfig) -> Results:
    """Evaluates one model, prints a table, writes the JSON file and returns what it holds.

    That is ``{"model", "preferences": {metric: value}}`` and under each of ``"tasks"``, ``"texts"`` and
    ``"generation"`` ``{name: {metric: value}}``. Raises `UserError` before weights are read where
    something given cannot be used.
    """
    console = Console()
    check_settings(config)
    if not (config.preferences or config.tasks or config.texts or config.generation):
        raise UserError("Nothing to evaluate: give preferences, tasks, texts or generation.")
    output = Path(config.output)
    check_new_file(output, "output")
    model = check_model(ModelOptions(path=config.model, dtype=config.dtype), name="model")
    tokenizer = load_tokenizer(config.model, "model")
    tasks = read_tasks(config, tokenizer, model.max_position_embeddings, console)
    pairs = None
    if config.preferences is not None:
        check_related(config.preferences.reference, config.model, "preferences.reference")
        pairs = _read_pairs(config.preferences, tokenizer)
        console.print(f"preferences: {pairs.report}", highlight=False)
    results = _evaluate(config, abstract_model(model, None)[0], tasks, pairs, tokenizer)
    # Shown first: whatever keeps the file from being written, the work is not lost.
    console.print(_table(results))
    with blamed_on("output"):
        check_new_file(output, "output")
        write_json(output, results)
    console.print(f"Written to {output}", highlight=False, soft_wrap=True)
    return results


def _read_pairs(options: PreferenceEvalOptions, tokenizer: Any) -> TokenDataset:
    """Reads the held-out pairs, or all of them where nothing is to be held out."""
    name = "preferences.path"
    everything, held_out = split_records(options, name)
    records = everything if held_out is None else held_out
    pairs = tokenized(records, options, name, tokenize_preference, tokenizer)
    return sharing_prompts(pairs, options)


def _evaluate(
    config: EvalConfig,
    graphdef: nnx.GraphDef,
    tasks: Tasks,
    pairs: TokenDataset | None,
    tokenizer: Any,
) -> Results:
    """Scores with the reference first, then with the model: one is in memory at a time."""
    results: Results = {"model": str(config.model)}
    evaluate, size = None, config.batch_size
    if pairs is not None and config.preferences is not None:
        score, loss = reference_logps_fn(graphdef), PreferenceLoss(beta=config.preferences.beta)
        pairs = _with_reference(config, score, pairs)
        evaluate = evaluate_preferences(score, pairs, loss=loss, batch_size=size, mesh=None)
    params = _load(config.model, config, "model")
    if pairs is not None and evaluate is not None:
        metrics = {name.removeprefix("eval_"): v for name, v in evaluate(params).items()}
        results["preferences"] = {**metrics, "pairs": len(pairs)}
    ends = end_tokens(config.model, tokenizer)
    scores = task_scorer(graphdef, tasks, tokenizer, ends, batch_size=size, show=True)
    return {**results, **scores(params)}


def _with_reference(config: EvalConfig, score: Score, pairs: TokenDataset) -> TokenDataset:
    """Adds the log-probabilities that the reference gives the answers of pairs."""
    assert config.preferences is not None
    params = _load(config.preferences.reference, config, "preferences.reference")
    chosen, rejected = answer_logps(
        score, params, pairs, config.batch_size, None, shown_as="reference"
    )
    return pairs.with_columns(reference_chosen_logps=chosen, reference_rejected_logps=rejected)


def _load(path: str, config: EvalConfig, name: str) -> Any:
    """Reads the parameters of a model that the field `name` gives."""
    with blamed_on(name):
        # Parameters stay float32, as in training: only the computation takes the type.
        return split_model(
            from_hf(path, dtype=np.dtype(config.dtype), param_dtype=np.dtype("float32"))
        )[1]


def _table(results: Results) -> Table:
    """Makes a table of all metrics, a group for the preferences and for every task."""
    table = Table("", "metric", title=results["model"])
    table.add_column("value", justify="right")
    groups = [("preferences", results.get("preferences", {}))]
    for kind in ("tasks", "texts", "generation"):
        groups += results[kind].items()
    for group, metrics in groups:
        for number, (name, value) in enumerate(metrics.items()):
            shown = str(value) if isinstance(value, int) else f"{value:.4f}"
            table.add_row(group if number == 0 else "", name, shown)
    return table
