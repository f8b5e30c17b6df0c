"""Merged directories hold what the library and mergekit give for the whole trees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import omerge_jax as om
from tests.train.tiny_runs import flags, make_model_dir
from train.cli import main

WEIGHTS = [0.7, -0.4]
CASES = {
    "linear": {"normalize": True},
    "task_arithmetic": {"scale": 0.5},
    "ties": {"density": [0.4, 0.8], "election": "count"},
    "dare_linear": {"density": [0.5, 0.5], "rescale": "inverse", "seed": 3},
    "dare_ties": {"density": [0.5, 1.0]},
    "della_linear": {"density": [0.5, 0.6], "epsilon": 0.1},
    "della": {"density": [0.5, 0.6], "seed": 1},
    "breadcrumbs": {"density": [0.5, 0.6], "gamma": 0.05},
    "breadcrumbs_ties": {"density": [0.5, 0.6], "normalize": True},
    "slerp": {"t": 0.3},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """A base and two models whose directories hold what old and new tools write."""
    path = tmp_path_factory.mktemp("models")
    names = ["base", "a", "b"]
    # A width with which few shapes have to be compiled.
    made = [make_model_dir(path / name, seed, hidden=48) for seed, name in enumerate(names)]
    base, a, _ = made
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # tied, stored twice
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    tensors["model.steps"] = np.arange(5)
    save_file(tensors, base / "model.safetensors")
    (base / "chat_template.jinja").write_text("the base's")
    (a / "chat_template.jinja").write_text("{{ messages }} of a")
    return made


def merge(out: Path, base: Path | None, models: list[dict], **settings) -> int:
    values = {"base": base, "models": json.dumps(models), "output": out, **settings}
    return main(["merge", *flags(values)])


def given(models: list[Path], method: str, settings: dict) -> tuple[list[dict], dict]:
    """The models and the other settings, as the command takes them."""
    one = [{"path": str(path)} for path in models[1:]]
    settings = dict(settings)
    if method == "slerp":
        return one[:1], settings
    for entry, weight in zip(one, WEIGHTS, strict=True):
        entry["weight"] = weight
    for entry, density in zip(one, settings.pop("density", []), strict=False):
        entry["density"] = density
    return one, {k: str(v).lower() for k, v in settings.items()}


@pytest.mark.parametrize("method", CASES)
def test_every_method_is_the_library_s_on_whole_trees(models, tmp_path, method):
    entries, settings = given(models, method, CASES[method])
    base = None if method == "linear" else models[0]
    assert merge(tmp_path / "out", base, entries, method=method, **settings) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    trees = [load_file(path / "model.safetensors") for path in models]
    names = sorted(trees[1])  # without the copy and the buffers of the base
    trees = [{name: jnp.asarray(tree[name]) for name in names} for tree in trees]
    theirs = trees[1:2] if method == "slerp" else trees[1:]
    weights = {} if method == "slerp" else {"weights": WEIGHTS}
    origin = trees[1] if base is None else trees[0]
    whole = om.offline_merge(origin, theirs, method=method, **weights, **CASES[method])
    assert sorted(found) == sorted(load_file((base or models[1]) / "model.safetensors"))
    for name in names:
        np.testing.assert_array_equal(found[name], whole[name], err_msg=name)
    assert np.abs(found[names[0]] - trees[0][names[0]]).max() > 1e-3
    if base is not None:
        np.testing.assert_array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
        np.testing.assert_array_equal(found["model.steps"], np.arange(5))
        assert (found["model.layers.0.self_attn.rotary_emb.inv_freq"] == 1).all()


def test_ties_is_mergekit_s(models, tmp_path):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    entries, _ = given(models, "ties", {"density": [0.4, 0.8]})
    assert merge(tmp_path / "out", models[0], entries, method="ties") == 0
    loaded = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in models]
    parameters = {"weight": WEIGHTS, "density": [0.4, 0.8]}
    expected = mergekit.merge_state_dicts(loaded, "ties", parameters=parameters, base=0)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("method", "settings", "kept"),
    [
        ("linear", {}, 1),
        ("slerp", {"t": 0.0}, 0),
        ("task_arithmetic", {"scale": 0.0}, 0),
        ("ties", {"scale": 0.0, "density": 0.5}, 0),
    ],
)
def test_an_identity_keeps_every_bit(models, tmp_path, method, settings, kept):
    settings = dict(settings)
    entry = {"path": str(models[1]), "density": settings.pop("density", None)}
    entry["weight"] = None if method == "slerp" else 1.0
    base = None if method == "linear" else models[0]
    assert merge(tmp_path / "out", base, [entry], method=method, **settings) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(models[kept] / "model.safetensors").items():
        assert found[name].tobytes() == tensor.tobytes(), name


def test_bfloat16_in_shards(models, tmp_path):
    entries, _ = given(models, "ties", {})
    out = tmp_path / "out"
    changes = {"method": "ties", "dtype": "bfloat16", "max_shard_size": 30_000}
    assert merge(out, models[0], entries, **changes) == 0
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert max(file.stat().st_size for file in shards) < 34_000
    assert merge(tmp_path / "whole", models[0], entries, method="ties") == 0
    rounded = AutoModelForCausalLM.from_pretrained(out)
    assert rounded.dtype == torch.bfloat16
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_rest_of_the_directory(models, tmp_path):
    entries, _ = given(models, "ties", {})
    assert merge(tmp_path / "out", models[0], entries, method="ties") == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }} of a"
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert vocabulary == AutoTokenizer.from_pretrained(models[0]).get_vocab()
    assert merge(tmp_path / "as_base", models[0], entries, method="ties", like=models[0]) == 0
    assert (tmp_path / "as_base" / "chat_template.jinja").read_text() == "the base's"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "ties" in (card.data.tags or [])
    # The recorded settings give the same model again.
    file = tmp_path / "out" / "merge.yaml"
    assert yaml.safe_load(file.read_text())["method"] == "ties"
    assert main(["merge", "--config", str(file), "--output", str(tmp_path / "again")]) == 0
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]


def test_nothing_is_overwritten_or_left_behind(models, tmp_path, capsys):
    entries, _ = given(models, "ties", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    assert merge(tmp_path / "full", models[0], entries, method="ties") == 2
    assert "output: " in capsys.readouterr().err
    huge = tmp_path / "huge"
    shutil.copytree(models[1], huge)
    tensors = load_file(huge / "model.safetensors")
    tensors["model.norm.weight"] = np.full(48, 1e30, np.float32)
    save_file(tensors, huge / "model.safetensors")
    entry = {"path": str(huge), "weight": 1.0}
    assert merge(tmp_path / "out", None, [entry], dtype="float16") == 2
    assert "model.norm.weight holds 48 values beyond the range" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "huge"]


MISTAKES = [
    ({"method": "ties", "base": None}, {}, "base: method ties needs base"),
    ({"method": "linear"}, {}, "base: method linear does not use base; leave it out"),
    ({"method": "ties"}, {"weight": None}, "models[0].weight is not set"),
    ({"method": "ties", "t": 0.5}, {}, "merge: method 'ties' does not use t"),
    ({"method": "ties"}, {"density": 1.5}, "merge: density is the share of entries kept"),
    ({"method": "slerp", "t": 0.5}, {}, "merge: method 'slerp' merges base with exactly one model"),
    ({"method": "ties"}, {"path": "nowhere/at/all"}, "models[1].path: nowhere/at/all is not"),
    ({"method": "ties", "base": "wide"}, {}, "models[0].path: not of one architecture with base"),
    (
        {"method": "ties", "base": "other"},
        {},
        "models[0].path: its tokenizer differs from that of base",
    ),
    ({"method": "ties", "base": "long"}, {}, "rope_theta is 10000.0 and 500000.0"),
    ({"method": "ties", "base": "double"}, {}, "base: F32, F16 and BF16 are merged; model.norm"),
]


@pytest.mark.parametrize(("changes", "last", "message"), MISTAKES)
def test_mistakes_are_named_before_anything_is_written(
    models, tmp_path, capsys, changes, last, message
):
    entries, _ = given(models, "ties", {})
    (entries[0] if "weight" in last and last["weight"] is None else entries[1]).update(last)
    settings = {"base": str(models[0]), **changes}
    made = {
        "wide": {"hidden": 64},
        "other": {"extra_tokens": ("<think>",), "hidden": 48},
        "long": {"hidden": 48},
        "double": {"hidden": 48},
    }
    if settings["base"] in made:
        name = settings["base"]
        settings["base"] = str(make_model_dir(tmp_path / name, **made[name]))
    base = tmp_path / "long" / "config.json"
    if base.exists():
        text = json.loads(base.read_text())
        text["rope_parameters"]["rope_theta"] = 5e5
        base.write_text(json.dumps(text))
    double = tmp_path / "double" / "model.safetensors"
    if double.exists():
        tensors = load_file(double)
        tensors["model.norm.weight"] = np.ones(48)
        save_file(tensors, double)
    out = tmp_path / "out"
    assert merge(out, settings.pop("base"), entries, **settings) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not out.exists()
