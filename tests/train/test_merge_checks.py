"""Models that a merge would turn into noise are refused; what follows from the config is not merged."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.train.tiny_models import make_model
from tests.train.tiny_runs import make_model_dir, read_tensors
from train.commands.merge import merge_models
from train.commands.merge_checks import network_differences
from train.config import MergeConfig, MergeModelOptions, UserError


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    return [make_model_dir(tmp_path / name, seed) for seed, name in enumerate(("base", "a"))]


def merge(pair: list[Path], output: Path, **changes) -> Path:
    models = [MergeModelOptions(path=str(pair[1]), weight=0.5)]
    settings = {"method": "task_arithmetic", "base": str(pair[0]), **changes}
    return merge_models(MergeConfig(models=models, output=str(output), **settings))


def change_tensors(directory: Path, **tensors: np.ndarray) -> None:
    stored = load_file(directory / "model.safetensors")
    save_file({**stored, **tensors}, directory / "model.safetensors", metadata={"format": "pt"})


def test_another_network_behind_the_same_shapes(pair, tmp_path):
    file = pair[1] / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    config["max_position_embeddings"] = 512  # changes no output
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"models\[0\]\.path: rope_theta is 500000\.0 and 10000\.0"):
        merge(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_spellings_of_one_network_are_no_difference():
    new = make_model("llama-gqa-theta5e5").config.to_dict()
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    assert network_differences(new, {**old, "rope_theta": 5e5}) == []
    assert network_differences(new, {**old, "rope_theta": 1e4}) == [
        "rope_theta is 10000.0 and 500000.0"
    ]


def test_an_unknown_architecture_is_compared_by_name():
    ours = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    assert network_differences(ours, {**ours, "state_size": 8}) == []
    assert network_differences(ours, {**ours, "architectures": ["X"]}) == [
        "architectures is ['X'] and ['MambaForCausalLM']"
    ]


def test_a_tied_matrix_that_is_no_copy(pair, tmp_path):
    embedding = load_file(pair[1] / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(pair[1], **{"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"models\[0\]\.path: .* lm_head\.weight differs from"):
        merge(pair, tmp_path / "out")


def test_frequencies_of_old_versions_come_from_the_base(pair, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(pair[0], **{name: np.full(4, 0.25, np.float32)})
    # One model has others, and one has a tensor more: both follow from the config.
    change_tensors(pair[1], **{name.replace("0", "1"): np.ones(4, np.float32)})
    merged = read_tensors(merge(pair, tmp_path / "out"))
    assert (merged[name] == 0.25).all()
    assert name.replace("0", "1") not in merged
    change_tensors(pair[1], **{name: np.ones(4, np.float32)})
    assert (read_tensors(merge(pair, tmp_path / "again"))[name] == 0.25).all()


def test_a_disk_that_is_too_small(pair, tmp_path, monkeypatch):
    size = sum(tensor.nbytes for tensor in read_tensors(pair[0]).values())
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size - 1))
    with pytest.raises(UserError, match=r"output: the result has .* GB, but only"):
        merge(pair, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()
    merge(pair, tmp_path / "half", dtype="bfloat16")
