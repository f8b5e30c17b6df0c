"""README.md of the model directories that are written: what made the model, and its figures."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from train.config import MergeConfig
from train.data.formats import SUFFIXES
from train.models.model_dir import is_hub_name
from train.run_record import RunRecord, read_run

_TITLES = {
    "sft": "fine-tuned on prompts with answers (SFT)",
    "dpo": "aligned on preference pairs",
    "kto": "aligned on answers marked good or bad (KTO)",
}
# Of the optimizer's settings, those that say how it merges.
_MERGING = frozenset(
    (
        "name",
        "alpha",
        "density",
        "every_k",
        "rescale",
        "delta_mask",
        "clip",
        "election",
        "threshold",
    )
)
_PAPER = (
    "Lu et al., *Online Merging Optimizers for Boosting Rewards and Mitigating Tax in Alignment*, "
    "[arXiv 2405.17931](https://arxiv.org/abs/2405.17931)"
)


def run_card(run: str | Path, step: int) -> str:
    """The card of a model that a run trained.

    Args:
        run: The run's output directory: its settings and logged metrics are read.
        step: Whose weights are exported; metrics are the last ones up to there.

    Returns:
        Markdown with the front matter that the hub reads.

    Raises:
        UserError: the directory's files cannot be read.
    """
    record = read_run(Path(run))
    settings = record.settings
    model, base = str(settings["model.path"]), settings.get("model.base")
    merges = base is not None
    start = _card_of(model)
    data = ModelCardData(
        base_model=_hub_name(model, start),
        base_model_relation="finetune",
        library_name="transformers",
        pipeline_tag="text-generation",
        license=start.get("license"),
        datasets=_hub_data(settings) or None,
        tags=["omerge_jax", record.command, *(["online-merging"] if merges else [])],
    )
    title = _TITLES.get(record.command, f"trained with {record.command}")
    sections = [
        f"# {record.name}",
        f"A model {title}, from `{model}`, with [omerge_jax](https://arxiv.org/abs/2405.17931); the "
        f"weights are those of step {step}.",
        *(_online_merging(record, step) if merges else []),
        *_figures(record, step),
        "## Recipe\n\n" + _code(_nested(settings)),
        _footer(merges),
    ]
    return _text(data, sections)


def merge_card(config: MergeConfig, name: str) -> str:
    """The card of a model that was merged without training.

    Args:
        config: The merge.
        name: Of the model.

    Returns:
        Markdown with the front matter that the hub reads.
    """
    sources = [*([config.base] if config.base else []), *(model.path for model in config.models)]
    names = [_hub_name(source, _card_of(source)) for source in sources]
    known = [name for name in dict.fromkeys(names) if name is not None]
    data = ModelCardData(
        base_model=known or None,
        base_model_relation="merge",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["omerge_jax", "merge", config.method],
    )
    rows = [
        (f"`{model.path}`", _figure(model.weight), _figure(model.density))
        for model in config.models
    ]
    base = f" around the base `{config.base}`" if config.base else ""
    sections = [
        f"# {name}",
        f"A merge of {len(rows)} models by `{config.method}`{base}, computed in float32, as "
        "`omerge_jax.offline_merge` and mergekit define it.",
        _table(("model", "weight", "density"), rows),
        "## Merge settings\n\n" + _code(dataclasses.asdict(config)),
        _footer(False),
    ]
    return _text(data, sections)


def _online_merging(record: RunRecord, step: int) -> list[str]:
    rows = [
        (name.removeprefix("optimizer."), f"`{value}`")
        for name, value in record.settings.items()
        if value is not None and name.split(".")[:2][-1] in _MERGING
    ]
    last = _last_values(record, step)
    rows += [(name, _figure(last[name])) for name in last if name.startswith("merge/")]
    return [
        "## Online merging\n\n"
        "Every optimizer update was blended with the difference between the fine-tuned model "
        f"`{record.settings['model.path']}` and its base `{record.settings['model.base']}`, so that "
        "alignment keeps what the model already knew.\n\n" + _table(("setting", "value"), rows)
    ]


def _figures(record: RunRecord, step: int) -> list[str]:
    last = _last_values(record, step)
    names = [name for name in last if not name.startswith("merge/")]
    names.sort(key=lambda name: not name.startswith("eval_"))
    if not names:
        return []
    heading = "## Metrics\n\nThe last ones logged up to that step; `eval_` is held-out data.\n\n"
    return [heading + _table(("metric", "value"), [(n, _figure(last[n])) for n in names])]


def _last_values(record: RunRecord, step: int) -> dict[str, float]:
    last: dict[str, float] = {}
    for row in record.rows:
        if row["step"] <= step:
            last.update(row)
    return {
        name: value for name, value in last.items() if name not in ("step", "tokens_per_second")
    }


def _card_of(path: str) -> Mapping[str, Any]:
    """The front matter of a local model's own card."""
    file = Path(path) / "README.md"
    if not file.is_file():
        return {}
    parts = file.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _hub_name(path: str, card: Mapping[str, Any]) -> str | None:
    """The hub's name of a model; for a local one that of the model it was made from, if known."""
    if not Path(path).exists():
        return path if is_hub_name(path) else None
    known = card.get("base_model")
    known = known[0] if isinstance(known, list) and known else known
    return known if isinstance(known, str) else None


def _hub_data(settings: Mapping[str, Any]) -> list[str]:
    path = settings.get("data.path")
    return (
        [path]
        if isinstance(path, str) and is_hub_name(path) and not path.endswith(SUFFIXES)
        else []
    )


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as config.yaml has them, without those that were left unset."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        if value is None:
            continue
        *outer, last = name.split(".")
        node = nested
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def _code(settings: Any) -> str:
    return f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```"


def _footer(paper: bool) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "flax")
    )
    cite = f"Method: {_PAPER}.\n\n" if paper else ""
    return f"{cite}Made with {versions}, Python {platform.python_version()}."


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if math.isfinite(value) else str(value)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(headings), "|" + "---|" * len(headings), *map(line, rows)])


def _text(data: ModelCardData, sections: Sequence[str]) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
