"""Offline merges of directories: next to merges of whole trees and to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import omerge_jax as om
from tests.train.tiny_runs import make_model_dir, read_tensors
from train.cli import main
from train.commands.merge import merge_models
from train.config import MergeConfig, MergeModelOptions, UserError
from train.models.safetensors_dir import SafetensorsDir

CASES = {
    "linear": {},
    "task_arithmetic": {"scale": 0.7},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.4, "seed": 3},
    "dare_ties": {"density": 0.6, "rescale": "inverse"},
    "della_linear": {"density": 0.5, "epsilon": 0.2},
    "della": {"density": 0.5, "election": "count"},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "normalize": True},
    "slerp": {"t": 0.3},
}
PER_MODEL = ("density", "epsilon", "gamma")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    paths = [make_model_dir(root / name, seed) for seed, name in enumerate(("base", "a", "b"))]
    shared = load_file(paths[0] / "model.safetensors")
    for path in paths:
        tensors = load_file(path / "model.safetensors")
        tensors["model.norm.weight"] = shared["model.norm.weight"] + np.float32(0.1)
        tensors["steps"] = np.arange(5)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return [str(path) for path in paths]


def configuration(directories, output, method, **changes):
    base, *paths = directories[:2] if method == "slerp" else directories
    own = {name: changes.pop(name) for name in PER_MODEL if name in changes}
    weights = [None] if method == "slerp" else [0.8, 0.3]
    models = [
        MergeModelOptions(path=path, weight=weight, **own)
        for path, weight in zip(paths, weights, strict=True)
    ]
    return MergeConfig(method=method, base=base, models=models, output=str(output), **changes)


@pytest.mark.parametrize("method", CASES)
def test_equal_to_a_merge_of_whole_trees(directories, tmp_path, method):
    merge_models(configuration(directories, tmp_path / "out", method, **CASES[method]))
    used = directories[:2] if method == "slerp" else directories
    base, *models = ({k: jnp.asarray(v) for k, v in _tensors(d).items()} for d in used)
    settings = dict(CASES[method]) | ({} if method == "slerp" else {"weights": [0.8, 0.3]})
    expected = om.offline_merge(base, models, method=method, **settings)
    merged = read_tensors(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-6, err_msg=name)
    kernel = "model.layers.1.mlp.up_proj.weight"
    assert np.abs(merged[kernel] - np.asarray(base[kernel])).max() > 1e-2


def _tensors(directory):
    weights = SafetensorsDir(Path(directory))
    return {name: weights.read(name) for name in weights.entries}


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_equal_to_mergekit(directories, tmp_path, method):
    merge_methods = pytest.importorskip("mergekit.merge_methods", reason="mergekit not installed")
    used = directories[1:] if method == "linear" else directories
    states = [
        {k: torch.from_numpy(v) for k, v in _tensors(d).items() if k != "steps"} for d in used
    ]
    density = {} if method == "linear" else {"density": 0.4}
    expected = merge_methods.merge_state_dicts(
        states,
        method,
        parameters={"weight": [0.8, 0.3], **density},
        base=None if method == "linear" else 0,
    )
    merge_models(configuration(directories, tmp_path / "out", method, **density))
    merged = read_tensors(tmp_path / "out")
    for name, tensor in expected.items():
        np.testing.assert_allclose(merged[name], tensor.numpy(), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_what_no_model_changed_comes_back_bit_for_bit(directories, tmp_path, method):
    merge_models(configuration(directories, tmp_path / "out", method, **CASES[method]))
    merged, base = read_tensors(tmp_path / "out"), _tensors(directories[0])
    for name in ("steps", "model.norm.weight"):
        assert merged[name].dtype == base[name].dtype
        assert merged[name].tobytes() == base[name].tobytes()


def test_adamw_plus_a_share_of_the_delta(directories, tmp_path):
    """θ + λ·(θ_SFT − θ_base) is task arithmetic with weights 1 and λ."""
    base, trained, sft = directories
    models = [MergeModelOptions(path=trained, weight=1.0), MergeModelOptions(path=sft, weight=0.25)]
    out = tmp_path / "out"
    merge_models(MergeConfig(method="task_arithmetic", base=base, models=models, output=str(out)))
    b, t, s = (_tensors(d) for d in directories)
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = t[name].astype(np.float64) + 0.25 * (s[name].astype(np.float64) - b[name])
    np.testing.assert_allclose(read_tensors(out)[name], expected, rtol=0, atol=1e-6)


def test_a_directory_that_transformers_loads(directories, tmp_path):
    """From YAML, in bfloat16, in several files, with tokenizer, template and card."""
    base, first, second = directories
    out, file = tmp_path / "out", tmp_path / "merge.yaml"
    settings = {
        "method": "dare_ties",
        "base": base,
        "models": [
            {"path": first, "weight": 0.5, "density": 0.5},
            {"path": second, "weight": 0.5, "density": 0.5},
        ],
        "dtype": "bfloat16",
        "output": str(out),
        "max_shard_size": 20_000,
    }
    file.write_text(yaml.safe_dump(settings))
    assert main(["merge", "--config", str(file)]) == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    front = next(yaml.safe_load_all((out / "README.md").read_text().split("\n---\n")[0]))
    assert front["library_name"] == "transformers"
    assert "base_model" not in front  # local directories are no names on the Hub
    assert main(["merge", "--config", str(file)]) == 2


def test_a_stored_output_matrix_stays_tied(directories, tmp_path):
    copies = []
    for number, source in enumerate(directories):
        copy = make_model_dir(tmp_path / str(number), number)
        tensors = _tensors(source)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        copies.append(str(copy))
    merge_models(configuration(copies, tmp_path / "out", "dare_ties", density=0.5))
    merged = read_tensors(tmp_path / "out")
    assert (merged["lm_head.weight"] == merged["model.embed_tokens.weight"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ties", "t": 0.5}, "does not use t"),
        ({"method": "ties", "density": 1.5}, "density"),
        ({"method": "slerp"}, "needs t"),
    ],
)
def test_settings_refused(directories, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        merge_models(configuration(directories, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_models_refused(directories, tmp_path):
    other = str(make_model_dir(tmp_path / "wide", 1, hidden=48))
    with pytest.raises(UserError, match=r"models\[1\]\.path: model\..* has shape"):
        merge_models(configuration([*directories[:2], other], tmp_path / "out", "ties"))
    longer = str(make_model_dir(tmp_path / "tokens", 1, extra_tokens=("<x>",)))
    with pytest.raises(UserError, match="tokenizer"):
        merge_models(configuration([*directories[:2], longer], tmp_path / "out", "ties"))
    with pytest.raises(UserError, match="base"):
        merge_models(
            MergeConfig(method="ties", models=[MergeModelOptions(path="x", weight=1)], output="o")
        )
