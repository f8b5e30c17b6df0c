"""``python -m train eval``: what a model prefers and what it still knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from train.commands.generate import end_tokens
from train.config import EvalConfig, ModelOptions, UserError, check_settings
from train.data import TokenDataset, tokenize_preference
from train.distributed.mesh import abstract_model
from train.evaluation.held_out import Score, answer_logps, evaluate_preferences
from train.evaluation.tasks import Tasks, read_tasks, task_scorer
from train.files.run_directory import check_place, write_atomically
from train.inputs.model import (
    blamed_on,
    check_model,
    check_related,
    load_tokenizer,
    sharing_prompts,
    split_records,
    tokenized,
)
from train.models import from_hf, split_model
from train.objectives.preference import reference_logps_fn

Results = dict[str, Any]


def run(config: EvalConfig) -> Results:
    """Evaluates one model, prints a table and writes the JSON file.

    Returns:
        What the file holds: ``{"model", "preferences": {metric: value}}`` and under each of
        ``"tasks"``, ``"texts"`` and ``"generation"`` ``{name: {metric: value}}``.

    Raises:
        UserError: something given cannot be used; before weights are read.
    """
    console = Console()
    output = _check(config)
    model = check_model(ModelOptions(path=config.model, dtype=config.dtype), name="model")
    tokenizer = load_tokenizer(config.model, "model")
    tasks = read_tasks(config, tokenizer, model.max_position_embeddings, console)
    pairs = None
    if config.preferences is not None:
        check_related(config.preferences.reference, config.model, "preferences.reference")
        everything, held_out = split_records(config.preferences, "preferences.path")
        records = everything if held_out is None else held_out
        pairs = sharing_prompts(
            tokenized(
                records, config.preferences, "preferences.path", tokenize_preference, tokenizer
            ),
            config.preferences,
        )
        console.print(f"preferences: {pairs.report}", highlight=False)
    results = _evaluate(config, abstract_model(model, None)[0], tasks, pairs, tokenizer)
    # Shown first: whatever keeps the file from being written, the work is not lost.
    console.print(_table(results))
    with blamed_on("output"):
        _check_new(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, json.dumps(results, indent=2))
    console.print(f"Written to {output}", highlight=False, soft_wrap=True)
    return results


def _check(config: EvalConfig) -> Path:
    check_settings(config)
    named = [*config.tasks, *config.texts, *config.generation]
    if config.preferences is None and not named:
        raise UserError("Nothing to evaluate: give preferences, tasks, texts or generation.")
    output = Path(config.output)
    _check_new(output)
    check_place(output, "output")
    return output


def _check_new(output: Path) -> None:
    if output.exists():
        raise UserError(f"output: {str(output)!r} exists; nothing is overwritten.")


def _evaluate(
    config: EvalConfig,
    graphdef: nnx.GraphDef,
    tasks: Tasks,
    pairs: TokenDataset | None,
    tokenizer: Any,
) -> Results:
    """One model in memory at a time: the reference's scores first, then everything of the model."""
    results: Results = {"model": str(config.model)}
    pair_score = reference_logps_fn(graphdef)
    if pairs is not None:
        assert config.preferences is not None
        pairs = _with_reference(config, pair_score, pairs)
    params = _load(config.model, config, "model")
    if pairs is not None and config.preferences is not None:
        evaluate = evaluate_preferences(
            pair_score,
            pairs,
            beta=config.preferences.beta,
            batch_size=config.batch_size,
            mesh=None,
        )
        metrics = {name.removeprefix("eval_"): v for name, v in evaluate(params).items()}
        results["preferences"] = {**metrics, "pairs": len(pairs)}
    ends = end_tokens(config.model, tokenizer)
    scores = task_scorer(graphdef, tasks, tokenizer, ends, batch_size=config.batch_size, show=True)
    return {**results, **scores(params)}


def _with_reference(config: EvalConfig, score: Score, pairs: TokenDataset) -> TokenDataset:
    assert config.preferences is not None
    params = _load(config.preferences.reference, config, "preferences.reference")
    chosen, rejected = answer_logps(
        score, params, pairs, config.batch_size, None, shown_as="reference"
    )
    return pairs.with_columns(reference_chosen_logps=chosen, reference_rejected_logps=rejected)


def _load(path: str, config: EvalConfig, name: str) -> Any:
    with blamed_on(name):
        # Parameters stay float32, as in training: only the computation takes the type.
        return split_model(
            from_hf(path, dtype=np.dtype(config.dtype), param_dtype=np.dtype("float32"))
        )[1]


def _table(results: Results) -> Table:
    table = Table(title=results["model"])
    for column in ("", "metric", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    kinds = [results[kind] for kind in ("tasks", "texts", "generation")]
    groups = [
        ("preferences", results.get("preferences", {})),
        *(i for k in kinds for i in k.items()),
    ]
    for group, metrics in groups:
        for number, (name, value) in enumerate(metrics.items()):
            shown = str(value) if isinstance(value, int) else f"{value:.4f}"
            table.add_row(group if number == 0 else "", name, shown)
    return table
