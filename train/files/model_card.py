"""Model cards: the README.md of an exported or merged model, with the Hub's front matter."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from train.config import MergeConfig
from train.files.metrics_log import read_metrics


def merge_card(title: str, config: MergeConfig) -> str:
    """Makes the card of a merged model; settings that are unset are left out."""
    paths = [*([config.base] if config.base is not None else []), *(m.path for m in config.models)]
    settings = _given(dataclasses.asdict(config))
    command = " ".join(["python -m train", *sys.argv[1:]])
    return _card(
        title,
        paths,
        tags=["merge", config.method],
        relation="merge",
        opening=f"A merge of {len(config.models)} models by `{config.method}`.",
        sections={"Merge": _yaml_block(settings), "Command": _code(command)},
    )


def run_card(run: Path, title: str, step: int | None = None) -> str:
    """Makes the card of a trained model: settings, the last metrics up to `step`, command.

    It reads `run.json`, `config.yaml` and `metrics.jsonl` in the run's output directory. `step` is
    that of an exported checkpoint, None for the last one.
    """
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    command, settings = record["command"], record["settings"]
    config_file = run / "config.yaml"
    recipe = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
    optimizer = settings.get("optimizer.name", "adamw")
    model, base = settings.get("model.path"), settings.get("model.base")
    sections = {
        "Recipe": _code(recipe, "yaml") if recipe else _yaml_block(settings),
        "Final metrics": _metric_table(_last_metrics(run / "metrics.jsonl", step)),
        "Command": _code(f"python -m train {command} --config config.yaml"),
    }
    return _card(
        title,
        [path for path in (model, base) if path],
        tags=[command, optimizer],
        relation="finetune",
        opening=f"`{model}` after `{command}` with the optimizer `{optimizer}`.",
        sections=sections,
    )


def _last_metrics(file: Path, step: int | None) -> dict[str, float]:
    """Returns the last value of every metric of a `metrics.jsonl`, up to a step."""
    latest: dict[str, float] = {}
    for row in read_metrics(file) if file.exists() else []:
        if step is None or row["step"] <= step:
            latest |= row
    return latest


def _card(
    title: str,
    parents: Sequence[str],
    *,
    tags: Sequence[str],
    relation: str,
    opening: str,
    sections: Mapping[str, str],
) -> str:
    """Puts a card together: Markdown with YAML front matter."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    # The Hub refuses a base model that is no name on it, such as a local directory.
    on_hub = [parent for parent in dict.fromkeys(parents) if _is_hub_name(parent)]
    if on_hub:
        front |= {"base_model": on_hub, "base_model_relation": relation}
    front["tags"] = ["omerge_jax", *tags]
    body = "".join(f"\n## {name}\n\n{text}\n" for name, text in sections.items())
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n{opening}\n{body}"


def _is_hub_name(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and parts[0][0] not in ".~" and not Path(path).exists()


def _given(value: Any) -> Any:
    """Leaves out the fields that are unset, at any depth."""
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value


def _yaml_block(settings: Any) -> str:
    return _code(yaml.safe_dump(settings, sort_keys=False), "yaml")


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _metric_table(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return "None were logged."
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])
