"""Bad input ends with one clear message and status 2 before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.train.tiny_runs import make_model_dir, make_records, run_flags, write_inputs, write_jsonl
from train.cli import main
from train.config import DPOConfig
from train.config.command_line import configured
from train.files.run_directory import open_output


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def refused(inputs, tmp_path, capsys):
    """Runs a command with changed fields; returns its message after checking how it ended."""

    def run(command="dpo", **changes) -> str:
        output = Path(changes.pop("output_dir", tmp_path / "run"))
        before = sorted(output.rglob("*")) if output.exists() else None
        capsys.readouterr()  # what making the inputs printed
        status = main([command, *run_flags(inputs, output, **changes)])
        message = capsys.readouterr().err
        assert status == 2
        assert message.startswith("error: ")
        assert "Traceback" not in message
        after = sorted(output.rglob("*")) if output.exists() else None
        assert after == before  # nothing was written
        return message

    return run


def test_missing_base(refused):
    message = refused(model__base=None)
    assert "model.base is not set; on_dare merges with the delta" in message


def test_base_that_does_not_exist(refused, tmp_path):
    message = refused(model__base=tmp_path / "nowhere" / "base")
    assert "model.base: " in message
    assert "nowhere/base is not an existing directory" in message


def test_base_of_another_shape(refused, tmp_path):
    wide = make_model_dir(tmp_path / "wide", hidden=64)
    message = refused(model__base=wide)
    assert "model.base: " in message
    assert "hidden_size is 64 and 32" in message


def test_base_with_another_vocabulary(refused, tmp_path):
    other = make_model_dir(tmp_path / "other", extra_tokens=("<think>",))
    message = refused(model__base=other)
    assert "model.base: its tokenizer differs from that of" in message
    assert "tokens, for example" in message


def test_base_equal_to_the_model(refused, inputs):
    message = refused(model__base=inputs["model"])
    assert "model.base holds the same weights as model.path" in message


def test_base_with_the_weights_of_the_model_in_another_file(inputs, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(inputs["model"], copy)
    save_file(load_file(copy / "model.safetensors"), copy / "model.safetensors", {"by": "me"})
    run = tmp_path / "run"
    assert main(["dpo", *run_flags(inputs, run, model__base=copy)]) == 2
    message = capsys.readouterr().err
    assert "model.base holds the same weights as model.path in float32" in message
    assert not (run / "export").exists()


def test_base_for_an_optimizer_that_does_not_merge(refused):
    message = refused(optimizer__name="adamw", optimizer__alpha=None, optimizer__density=None)
    assert "model.base is set to" in message
    assert "adamw has no use for it" in message


def test_missing_tensor(refused, inputs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(inputs["model"], broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    message = refused(model__path=broken)
    assert "model.path: " in message
    assert "1 missing" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_missing_tokenizer(refused, inputs, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(inputs["model"], bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "model.path: " in refused(model__path=bare)


def test_missing_data_file(refused, tmp_path):
    message = refused(data__path=tmp_path / "pairs.jsonl.gz")
    assert "data.path: " in message
    assert "does not exist" in message


def test_preference_file_with_a_broken_line(refused, tmp_path):
    lines = [json.dumps(record) for record in make_records(4)]
    lines[2] = lines[2][:30]
    file = tmp_path / "broken.jsonl"
    file.write_text("\n".join(lines))
    message = refused(data__path=file)
    assert "data.path: broken.jsonl line 3: not valid JSON" in message


def test_evaluation_file_is_named_by_its_own_field(refused, tmp_path):
    records = make_records(4)
    records[1]["chosen"] = "  "
    file = write_jsonl(tmp_path / "empty.jsonl", records)
    message = refused(data__eval_fraction=None, data__eval_path=file)
    assert "data.eval_path: empty.jsonl line 2: field 'chosen' is empty" in message


def test_empty_completion(refused, tmp_path):
    records = make_records(4)
    records[1]["chosen"] = "  "
    message = refused(data__path=write_jsonl(tmp_path / "empty.jsonl", records))
    assert "data.path: empty.jsonl line 2: field 'chosen' is empty" in message


def test_alpha_out_of_range(refused):
    assert "optimizer.alpha must be in [0, 1], got 2.0" in refused(optimizer__alpha=2)


def test_gate_without_pairs(refused):
    alpha = {
        "optimizer__alpha": None,
        "optimizer__alpha__value": 1e-3,
        "optimizer__alpha__gate": 0.7,
    }
    message = refused("kto", loss__type="kto", **alpha)
    assert "optimizer.alpha.gate is 0.7, a reward accuracy, which only losses on pairs" in message


def test_density_of_zero(refused):
    assert "optimizer.density must be in (0, 1], got 0.0" in refused(optimizer__density=0)


def test_every_k_of_zero(refused):
    assert "optimizer.every_k must be positive, got 0" in refused(optimizer__every_k=0)


def test_output_directory_with_another_run(refused, inputs, tmp_path):
    output = tmp_path / "first"
    config = configured("dpo", DPOConfig, run_flags(inputs, output))
    open_output("dpo", config).begin(config, {})
    (output / "checkpoints" / "4").mkdir(parents=True)
    message = refused(output_dir=output, optimizer__alpha=0.5)
    assert "holds another run: optimizer.alpha was 0.001, now 0.5" in message
    assert "choose a new output_dir" in message


def test_output_directory_with_other_files(refused, tmp_path):
    output = tmp_path / "notes"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    message = refused(output_dir=output)
    assert "is not empty and holds no run (found 'thesis.tex')" in message


def test_batch_larger_than_the_data(refused):
    message = refused(trainer__batch_size=64)
    assert "trainer.batch_size is 64, but there are only" in message


def test_sequences_longer_than_the_model(refused):
    message = refused(data__max_prompt_length=250)
    assert "is 266, but the model has 256 positions" in message


def test_field_of_another_optimizer(refused):
    message = refused(optimizer__election="weighted")
    assert "optimizer.election is set to 'weighted', but on_dare has no use for it" in message


def test_value_that_the_optimizer_refuses(refused):
    message = refused(optimizer__name="on_ties", optimizer__rescale="inverse")
    assert "optimizer on_ties: rescale must be 'none' or 'norm'" in message


def test_attention_that_cannot_share_prompts(refused):
    message = refused(model__attention="splash")
    assert "data.prefix_sharing is auto; set it to false" in message


def test_unknown_loss(refused):
    message = refused(loss__type="dpo2")
    assert "loss: Unknown loss_type 'dpo2'" in message


def test_steps_and_epochs_together(refused):
    assert "exactly one of trainer.steps and trainer.epochs" in refused(trainer__epochs=1)
