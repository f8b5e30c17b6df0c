"""What SFT and preference training share, before any weight is read."""

from __future__ import annotations

import dataclasses

import pytest

from tests.train.builders import GOOD
from tests.train.tiny_runs import make_model_dir
from train.config import ModelOptions, TrainerOptions, UserError
from train.data import tokenize_preference
from train.inputs.model import blamed_on, check_model, hash_model
from train.runs.set_up import count_steps, set_up


def test_steps_or_epochs_of_whole_batches():
    assert count_steps(TrainerOptions(batch_size=4, steps=9), rows=10) == 9
    assert count_steps(TrainerOptions(batch_size=4, epochs=1), rows=10) == 2
    assert count_steps(TrainerOptions(batch_size=4, epochs=2.5), rows=10) == 5
    assert count_steps(TrainerOptions(batch_size=4, epochs=2.5), rows=10, per_batch=3) == 15
    with pytest.raises(UserError, match=r"trainer\.epochs 0\.1 makes no step of 10 rows"):
        count_steps(TrainerOptions(batch_size=4, epochs=0.1), rows=10)
    with pytest.raises(UserError, match=r"trainer\.batch_size is 11, but there are only 10"):
        count_steps(TrainerOptions(batch_size=11, steps=1), rows=10)


def test_parameters_in_bfloat16_are_warned_about(tmp_path, capsys):
    shown = {}
    for name in ("float32", "bfloat16"):
        options = dataclasses.replace(GOOD.model, path=str(tmp_path), param_dtype=name)
        config = dataclasses.replace(GOOD, output_dir=str(tmp_path / "run"), model=options)
        with pytest.raises(UserError, match=r"model\.path"):
            set_up("dpo", config, tokenize_preference)
        shown[name] = capsys.readouterr().out
    assert shown["float32"] == ""
    assert shown["bfloat16"].count("\n") == 1
    assert "loses small updates to rounding" in shown["bfloat16"]


def test_configuration_takes_the_types_of_the_run(tmp_path):
    path = make_model_dir(tmp_path)
    options = ModelOptions(path=str(path), dtype="bfloat16", param_dtype="float32", remat="full")
    config = check_model(options)
    assert (config.dtype.name, config.param_dtype.name) == ("bfloat16", "float32")
    assert config.remat == "full"
    assert config.hidden_size == 32


def test_hash_follows_the_content_of_weights_and_configuration(tmp_path):
    path = make_model_dir(tmp_path / "a", 1)
    same, other = make_model_dir(tmp_path / "b", 1), make_model_dir(tmp_path / "c", 2)
    assert hash_model(str(path)) == hash_model(str(same))
    assert hash_model(str(path)) != hash_model(str(other))
    config = same / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert hash_model(str(path)) != hash_model(str(same))


def test_errors_are_blamed_on_the_field():
    with pytest.raises(UserError, match=r"^data\.path: no such file$"), blamed_on("data.path"):
        raise FileNotFoundError("no such file")
    with pytest.raises(UserError, match=r"^already clear$"), blamed_on("data.path"):
        raise UserError("already clear")
    with pytest.raises(RuntimeError), blamed_on("data.path"):
        raise RuntimeError("a defect of ours keeps its traceback")
