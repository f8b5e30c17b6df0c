"""Model cards: the hub's own parser reads them, and they say what the run's files say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.train.test_report import make_run
from train.config import MergeConfig, MergeModelOptions
from train.model_card import merge_card, run_card


def code(card: ModelCard) -> dict:
    """The settings in the card's code block."""
    return yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])


def rows(card: ModelCard) -> dict[str, str]:
    lines = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    return {cells[0].removeprefix("| "): cells[1].removesuffix(" |") for cells in lines}


def test_card_of_a_run(tmp_path):
    run = make_run(tmp_path / "mine", model__path="org/sft-model", model__base="org/base")
    card = ModelCard(run_card(run, step=9))
    assert card.data.base_model == "org/sft-model"
    assert card.data.library_name == "transformers"
    assert set(card.data.tags or []) == {"omerge_jax", "dpo", "online-merging"}
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.datasets is None  # a file is no data set of the hub
    found = rows(card)
    assert found["alpha"] == "`0.001`"
    assert found["density"] == "`0.5`"
    assert found["name"] == "`on_dare`"
    # Step 9 was exported, and step 8 was the last evaluation before it.
    assert float(found["loss"]) == pytest.approx(0.7 / 9, rel=1e-4)
    assert float(found["eval_loss"]) == pytest.approx(0.1, rel=1e-4)
    recipe, settings = code(card), yaml.safe_load((run / "config.yaml").read_text())
    assert recipe["trainer"]["steps"] == settings["trainer"]["steps"]
    assert recipe["optimizer"]["learning_rate"] == 1e-3
    assert "election" not in recipe["optimizer"]  # was left unset


def test_card_of_a_run_that_does_not_merge(tmp_path):
    plain = {"optimizer__name": "adamw", "model__base": None}
    plain |= {"optimizer__alpha": None, "optimizer__density": None}
    run = make_run(tmp_path / "plain", data__path="org/pairs", **plain)
    (run / "metrics.jsonl").unlink()  # nothing was logged yet
    card = ModelCard(run_card(run, step=1))
    assert "online-merging" not in (card.data.tags or [])
    assert "Online merging" not in card.text
    assert "## Metrics" not in card.text
    assert card.data.datasets == ["org/pairs"]


def test_a_local_model_hands_down_its_origin(tmp_path):
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "README.md").write_text("---\nbase_model: org/base\nlicense: apache-2.0\n---\n# SFT\n")
    card = ModelCard(run_card(make_run(tmp_path / "run", model__path=str(sft)), step=1))
    assert card.data.base_model == "org/base"
    assert card.data.license == "apache-2.0"
    (sft / "README.md").write_text("no front matter --- here")
    card = ModelCard(run_card(make_run(tmp_path / "other", model__path=str(sft)), step=1))
    assert card.data.base_model is None


def test_card_of_a_merge():
    models = [
        MergeModelOptions(path="org/a", weight=0.25, density=0.5),
        MergeModelOptions(path="local|dir", weight=0.75),
    ]
    config = MergeConfig(models=models, output="out", base="org/base", method="ties", scale=0.5)
    card = ModelCard(merge_card(config, Path("out").name))
    assert card.data.base_model == ["org/base", "org/a"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert set(card.data.tags or []) == {"omerge_jax", "merge", "ties"}
    assert "| `org/a` | 0.25 | 0.5 |" in card.text
    assert "| `local\\|dir` | 0.75 | – |" in card.text
    settings = code(card)
    assert settings["scale"] == 0.5
    assert settings["models"][1] == {"path": "local|dir", "weight": 0.75, "density": None}
