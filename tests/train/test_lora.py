"""Adapters and frozen parameters: numbers against numpy and PEFT, files, runs and their resumption."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.train.tiny_models import padded_batch, save_model, transformers_logits
from tests.train.tiny_runs import read_tensors, run_flags, write_inputs
from train.cli import main
from train.config import LoraOptions, ModelOptions, UserError
from train.inputs.model import with_adapters
from train.models import from_hf, merge_model, split_model, to_hf
from train.models.hf_names import abstract_decoder
from train.models.lora import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    fresh_adapters,
    is_adapter,
    merge_adapters,
    read_adapters,
    without_adapters,
    write_adapters,
)
from train.models.trainable import choose, join, leaf_paths, split
from train.objectives.sft import sft_loss
from train.training.checkpoint import Checkpoints
from train.training.step import init_state, make_train_step

RANK, SCALE = 3, 0.5
TARGETS = ("q_proj", "v_proj", "down_proj")


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), tree)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A model directory, the configuration with adapters, plain parameters and random adapters."""
    directory = tmp_path_factory.mktemp("model")
    save_model("qwen2-tied", directory)
    model = from_hf(directory)
    config = dataclasses.replace(
        model.config, lora_targets=TARGETS, lora_rank=RANK, lora_scale=SCALE
    )
    return directory, config, split_model(model)[1], random_like(fresh_adapters(config, 0))


def logits(config, params, tokens, mask):
    graphdef = abstract_decoder(config)[0]
    forward = jax.jit(lambda p: merge_model(graphdef, p)(tokens, mask))
    return np.asarray(forward(params))


def test_fresh_adapters_are_drawn_as_peft_does_and_add_nothing(adapted):
    _, config, params, _ = adapted
    fresh = fresh_adapters(config, 1)
    a = np.asarray(fresh["layers"]["mlp"]["down_proj"]["lora_a"])
    bound = config.intermediate_size**-0.5  # kaiming_uniform_ with a = sqrt(5)
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert not np.asarray(fresh["layers"]["mlp"]["down_proj"]["lora_b"]).any()
    assert {path[-2] for path in leaf_paths(fresh)} == set(TARGETS)
    tokens, mask = padded_batch([(0, 9), (3, 9)], 9)
    plain = logits(without_adapters(config), params, tokens, mask)
    np.testing.assert_array_equal(logits(config, join(params, fresh), tokens, mask), plain)


def test_merge_equals_float64_and_the_unmerged_forward_pass(adapted):
    _, config, params, adapters = adapted
    merged = merge_adapters(join(params, adapters), config.lora_scale)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    pair = adapters["layers"]["self_attn"]["v_proj"]
    a, b = (np.asarray(pair[name], np.float64) for name in ("lora_a", "lora_b"))
    kernel = np.asarray(params["layers"]["self_attn"]["v_proj"]["kernel"], np.float64)
    found = merged["layers"]["self_attn"]["v_proj"]["kernel"]
    np.testing.assert_allclose(found, kernel + SCALE * a @ b, rtol=1e-5, atol=1e-6)
    tokens, mask = padded_batch([(0, 9), (3, 9)], 9)
    ours = logits(config, join(params, adapters), tokens, mask)[mask]
    theirs = logits(without_adapters(config), merged, tokens, mask)[mask]
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert np.abs(ours - logits(without_adapters(config), params, tokens, mask)[mask]).max() > 0.1


def test_adapter_files_hold_what_peft_would_add(adapted, tmp_path):
    """The product of the written matrices, by PEFT's formula in torch, added to the stored weights."""
    directory, config, params, adapters = adapted
    out = tmp_path / "adapter"
    write_adapters(join(params, adapters), config, out, str(directory))
    settings = json.loads((out / CONFIG_FILE).read_text())
    scale = settings["lora_alpha"] / settings["r"]
    model = AutoModelForCausalLM.from_pretrained(directory)
    weights = model.state_dict()
    stored = {name: torch.tensor(x) for name, x in load_file(out / WEIGHTS_FILE).items()}
    assert len(stored) == 2 * len(TARGETS) * config.num_layers
    with torch.no_grad():
        for name, b in stored.items():
            if ".lora_B." in name:
                a = stored[name.replace("lora_B", "lora_A")]
                assert a.shape[0] == RANK == b.shape[1]
                target = name.removeprefix("base_model.model.").replace(".lora_B", "")
                weights[target] += scale * (b @ a)
    tokens, mask = padded_batch([(0, 9), (3, 9)], 9)
    expected = transformers_logits(model.eval(), tokens, mask)[mask]
    found = logits(config, join(params, adapters), tokens, mask)[mask]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    back = read_adapters(out, config)
    for path in leaf_paths(adapters):
        assert path in leaf_paths(back)
    np.testing.assert_array_equal(
        back["layers"]["mlp"]["down_proj"]["lora_a"],
        adapters["layers"]["mlp"]["down_proj"]["lora_a"],
    )


def test_peft_loads_and_merges_the_adapter(adapted, tmp_path):
    peft = pytest.importorskip("peft")
    directory, config, params, adapters = adapted
    out = tmp_path / "adapter"
    write_adapters(join(params, adapters), config, out, str(directory))
    model = AutoModelForCausalLM.from_pretrained(directory)
    model = peft.PeftModel.from_pretrained(model, out).merge_and_unload()
    graphdef = abstract_decoder(without_adapters(config))[0]
    merged = merge_adapters(join(params, adapters), config.lora_scale)
    to_hf(merge_model(graphdef, merged), tmp_path / "merged", like=directory)
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in ours:
            np.testing.assert_allclose(ours[name], tensor.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True; supported is False"),
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'; supported are lists"),
        ({"r": 4}, "model.lora.adapter has rank 4, alpha / rank 0.375"),
        ({"bias": "all"}, "bias is 'all'; supported is 'none'"),
    ],
)
def test_adapters_that_cannot_be_used(change, message, adapted, tmp_path):
    directory, config, params, adapters = adapted
    out = tmp_path / "adapter"
    write_adapters(join(params, adapters), config, out, str(directory))
    settings = json.loads((out / CONFIG_FILE).read_text())
    (out / CONFIG_FILE).write_text(json.dumps(settings | change))
    options = LoraOptions(
        rank=RANK, alpha=SCALE * RANK, target_modules=list(TARGETS), adapter=str(out)
    )
    with pytest.raises(UserError) as caught:
        with_adapters(without_adapters(config), options)
    assert message in str(caught.value)


def test_damaged_tensors_are_listed(adapted, tmp_path):
    directory, config, params, adapters = adapted
    out = tmp_path / "adapter"
    write_adapters(join(params, adapters), config, out, str(directory))
    tensors = load_file(out / WEIGHTS_FILE)
    first = next(name for name in tensors if "lora_A" in name)
    tensors["extra"] = tensors.pop(first)
    save_file(tensors, out / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"is missing, not .*extra is unexpected \(2 in all\)"):
        read_adapters(out, config)


@pytest.mark.slow
def test_only_what_is_trained_has_a_gradient_and_an_optimizer_state(adapted):
    _, config, params, adapters = adapted
    trained, frozen = split(join(params, adapters), is_adapter)
    tokens, mask = padded_batch([(0, 6), (2, 6)], 6)
    batch = {
        "prompt_tokens": tokens,
        "prompt_mask": mask,
        "completion_tokens": tokens,
        "completion_mask": np.ones_like(mask),
    }
    loss_fn = sft_loss(abstract_decoder(config)[0])
    tx = optax.adamw(1e-2)
    state = init_state(trained, tx)
    held = sum(leaf.size for leaf in jax.tree.leaves(state))
    adapter_size = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert held == 3 * adapter_size + 4  # parameters, two moments, four counters
    before = jax.tree.map(np.asarray, frozen)
    state, metrics = make_train_step(loss_fn, tx)(state, batch, frozen)
    whole = jax.jit(jax.grad(loss_fn, has_aux=True))(join(params, adapters), batch)[0]
    expected = optax.tree.norm(split(whole, is_adapter)[0])
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-5)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (before, frozen)), strict=True))


def test_patterns_choose_parameters():
    paths = [("embed_tokens",), ("layers", "mlp", "up_proj", "kernel"), ("norm", "weight")]

    def chosen(**fields):
        trained = choose(ModelOptions(path="m", **fields), paths)
        return [path[0] for path in paths if trained(path)]

    assert chosen() == ["embed_tokens", "layers", "norm"]
    assert chosen(freeze=["embed", "^norm"]) == ["layers"]
    assert chosen(trainable=[r"mlp\.up"]) == ["layers"]
    for fields, message in (
        ({"freeze": ["nothing"]}, "'nothing' is found in no parameter. There are embed_tokens, "),
        ({"freeze": ["("]}, "model.freeze: '(' is no regular expression"),
        ({"freeze": [""]}, "model.freeze leaves no parameter to train"),
        ({"freeze": ["norm"], "trainable": ["norm"]}, "model.freeze and model.trainable are both"),
        ({"freeze": ["norm"], "lora": LoraOptions()}, "model.lora and model.freeze are both set"),
    ):
        with pytest.raises(UserError) as caught:
            chosen(**fields)
        assert message in str(caught.value)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


ADAMW = {"model__base": None, "optimizer__name": "adamw", "optimizer__alpha": None} | {
    "optimizer__density": None
}
LORA = {"model__lora__rank": 2, "trainer__steps": 2, "trainer__save_every": 1}


@pytest.mark.slow
def test_a_lora_run_and_one_that_starts_from_its_adapter(inputs, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    rates = {"optimizer__learning_rate": 1e-2}
    assert main(["dpo", *run_flags(inputs, first, **ADAMW, **LORA, **rates)]) == 0
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["loss"] != rows[0]["loss"]
    # The export is the start with the adapter's products added, by an independent formula.
    start, merged = read_tensors(Path(inputs["model"])), read_tensors(first / "export")
    adapter = load_file(first / "adapter" / WEIGHTS_FILE)
    for name, tensor in merged.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        added = 0.0
        if f"{stem}.lora_A.weight" in adapter:
            added = 16 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            assert np.abs(added).max() > 0
        np.testing.assert_allclose(tensor, start[name] + added, rtol=1e-5, atol=1e-6)

    # A resumed run ends with the same bits; the frozen weights are not in its checkpoints.
    held = list((first / "checkpoints" / "2" / "state").glob("**/*"))
    assert sum(file.stat().st_size for file in held if file.is_file()) < 400_000
    expected = load_file(first / "adapter" / WEIGHTS_FILE)
    (first / "summary.json").unlink()
    shutil.rmtree(first / "checkpoints" / "2")
    shutil.rmtree(first / "export")
    shutil.rmtree(first / "adapter")
    assert main(["dpo", *run_flags(inputs, first, **ADAMW, **LORA, **rates)]) == 0
    assert "Resuming after step 1 of 2" in capsys.readouterr().out
    found = load_file(first / "adapter" / WEIGHTS_FILE)
    assert all((expected[name] == found[name]).all() for name in expected)
    assert main(["export", "--run", str(first), "--output", str(tmp_path / "exported")]) == 0
    again = read_tensors(tmp_path / "exported")
    assert all((merged[name] == again[name]).all() for name in merged)

    # A merging optimizer takes the adapter as the delta.
    flags = {"model__base": None, "model__lora__adapter": first / "adapter", **LORA}
    assert main(["dpo", *run_flags(inputs, second, **flags, **rates)]) == 0
    with Checkpoints(second / "checkpoints", read_only=True) as saved:
        assert saved.latest() == 2
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["merge/alpha"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__base": None}, "model.lora.adapter is not set; on_dare merges adapters"),
        ({"model__lora__adapter": "a"}, "model.base is set to"),
        ({**ADAMW, "model__lora__target_modules": "[q]"}, "target_modules: got 'q'; choose from"),
        (
            {**ADAMW, "model__lora__adapter": "none"},
            "model.lora.adapter: 'none' has no adapter_config",
        ),
    ],
)
def test_lora_settings_that_do_not_fit(changes, message, inputs, tmp_path, capsys):
    assert main(["dpo", *run_flags(inputs, tmp_path / "run", **{**LORA, **changes})]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_kto_trains_adapters_alone(inputs, tmp_path):
    run = tmp_path / "run"
    fields = {**ADAMW, **LORA, "trainer__steps": 1, "optimizer__learning_rate": 1e-2}
    assert main(["kto", *run_flags(inputs, run, **fields)]) == 0
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["loss"] == pytest.approx(0.5, abs=1e-5)
    assert row["kl"] == pytest.approx(0, abs=1e-3)
    start, merged = read_tensors(Path(inputs["model"])), read_tensors(run / "export")
    for name in start:
        assert (start[name] != merged[name]).any() == ("_proj" in name), name


@pytest.mark.slow
def test_a_run_with_frozen_parameters_leaves_them_as_they_were(inputs, tmp_path):
    run = tmp_path / "run"
    fields = {"model__freeze": "[embed, norm]", "trainer__steps": 2, "optimizer__storage": "dense"}
    assert main(["dpo", *run_flags(inputs, run, **fields)]) == 0
    start, end = read_tensors(Path(inputs["model"])), read_tensors(run / "export")
    for name in start:
        frozen = "embed" in name or "norm" in name
        assert (start[name] == end[name]).all() == frozen, name
    out = tmp_path / "exported"
    assert main(["export", "--run", str(run), "--output", str(out)]) == 0
    again = read_tensors(out)
    assert all((end[name] == again[name]).all() for name in end)
