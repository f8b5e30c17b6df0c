"""`python -m train plan` against the memory that the same run holds, and by the TPU compiler."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.train.builders import ROOT, big, needs_compiler, planned, run_with_compiler, tiny
from tests.train.tiny_runs import flags, make_model_dir, make_tokenizer, write_jsonl
from train.cli import main
from train.commands.plan import check_output
from train.config import MeshOptions, UserError
from train.plan.figures import State
from train.plan.measure import refused_temporaries
from train.plan.target import read_target

# Runs a real `dpo` on eight devices and notes what its second step holds and needs.
RUN = """
import json, sys
import jax
import train.runs.train
from train.cli import main

notes, make = [], train.runs.train.make_train_step

def watched(*args, **kwargs):
    step = make(*args, **kwargs)
    def call(*given):
        state, batch = given[:2]
        first = jax.devices()[0]
        def held(tree):
            return sum(shard.data.nbytes for leaf in jax.tree.leaves(tree)
                       for shard in leaf.addressable_shards if shard.device == first)
        live = held(jax.live_arrays())  # first: looking at the shards of an array makes more arrays
        memory = step.lower(*given).compile().memory_analysis()
        new = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
        notes.append({"parameters": held(state["params"]), "batch": held(batch), "all": held(state),
                      "live": live,
                      "total": memory.argument_size_in_bytes + memory.temp_size_in_bytes + new})
        return step(*given)
    return call

train.runs.train.make_train_step = watched
assert main(["dpo", *json.loads(sys.argv[1])]) == 0
print("NOTES", json.dumps(notes[-1]))
"""


def settings(tmp_path, model, base, prompt, answer, **changes):
    """Of a run whose rows are all as long as they may be, so that batches have the planned shape."""
    long = "many words " * 50
    records = [
        {"prompt": f"{long}{i}", "chosen": f"{i} {long}", "rejected": f"no {i} {long}"}
        for i in range(16)
    ]
    values = {
        "model.path": model,
        "model.base": base,
        "data.path": write_jsonl(tmp_path / "pairs.jsonl", records),
        "data.max_prompt_length": prompt,
        "data.max_completion_length": answer,
        "optimizer.name": "on_dare",
        "optimizer.learning_rate": 1e-4,
        "optimizer.alpha": 1e-3,
        "optimizer.density": 0.5,
        "optimizer.delta_dtype": "bfloat16",
        "trainer.batch_size": 8,
        "trainer.steps": 2,
    }
    return values | changes


def assert_plan_is_the_run(values, tmp_path):
    plan = planned(values, tmp_path, "cpu:8")["plan"]
    run = flags({**values, "output_dir": tmp_path / "run"})
    out = run_with_compiler("-c", RUN, json.dumps(run), devices=8)
    notes = json.loads(out.split("NOTES ", 1)[1].splitlines()[0])
    hbm = plan["hbm_bytes_per_chip"]
    state = hbm["parameters"] + hbm["optimizer"] + hbm["delta"]
    assert hbm["parameters"] == notes["parameters"]
    assert state == notes["all"]
    assert hbm["batch"] == notes["batch"]
    assert hbm["total"] - hbm["program"] == pytest.approx(notes["total"], rel=0.1)
    # Besides state and batch a run holds next to nothing on a device.
    assert state <= notes["live"] <= 1.1 * (state + hbm["batch"]) + 2**14
    return hbm


@pytest.mark.slow
def test_what_eight_devices_hold_is_what_was_planned(tmp_path):
    model, base = (make_model_dir(tmp_path / name, seed) for seed, name in enumerate("ab"))
    changes = {"mesh.fsdp": 4, "mesh.tensor": 2, "model.remat": "full"}
    values = settings(tmp_path, model, base, 24, 16, **changes)
    assert_plan_is_the_run(values, tmp_path)


def make_model_of_30m(path, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_model_of_30m_holds_what_was_planned(tmp_path, remat):
    model, base = (make_model_of_30m(tmp_path / name, seed) for seed, name in enumerate("ab"))
    values = settings(tmp_path, model, base, 128, 64, **{"model.remat": remat})
    hbm = assert_plan_is_the_run(values, tmp_path)
    assert 29e6 < 8 * hbm["parameters"] / 4 < 32e6


SPARSE = {"optimizer.storage": "sparse", "optimizer.delta_mask": "fixed"}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("changes", [{}, SPARSE], ids=["dense", "sparse"])
def test_llama_3_70b_fits_64_chips(tmp_path, changes):
    written = planned(big("llama-3-70b", 64, **changes), tmp_path, "v5p:4x4x4")
    plan, share = written["plan"], written["merge_share"]
    hbm = plan["hbm_bytes_per_chip"]
    assert plan["fits"]
    assert hbm["total"] < 95e9
    assert hbm["temporaries"] < 25 * 2**30
    assert 0 < share["hbm"] < 0.2
    assert 0 < share["hbm_bytes_of_a_step"] < 0.1


@pytest.mark.slow
@needs_compiler
def test_llama_3_8b_fits_sixteen_small_chips(tmp_path):
    plan = planned(big("llama-3-8b", 16), tmp_path, "v5e:4x4")["plan"]
    assert plan["fits"]
    assert plan["hbm_bytes_per_chip"]["total"] < 16e9
    # The compiler multiplies about as much as forward, recomputed forward and backward pass need.
    ratio = 16 * plan["step_per_chip"]["flops"] / plan["model_flops_of_all_chips"]
    assert 4 / 3 < ratio < 1.6


@pytest.mark.slow
@needs_compiler
def test_the_compiler_warns_of_no_option_on_a_v6e(tmp_path, monkeypatch):
    """It calls fused gathers a risk of wrong results there, in a log that is off by default."""
    monkeypatch.setenv("TPU_STDERR_LOG_LEVEL", "0")
    monkeypatch.setenv("TPU_MIN_LOG_LEVEL", "0")
    values = tiny(tmp_path / "model", 4) | {"topology": "v6e:2x2"}
    shown = run_with_compiler("-m", "train", "plan", *flags(values))
    assert "END_TO_END stage duration" in shown  # the log is on
    assert "Continuation fusion for AllGather is enabled" not in shown


@pytest.mark.slow
@needs_compiler
def test_a_delta_on_the_host_is_no_memory_of_a_tpu(tmp_path):
    values = tiny(tmp_path / "model", 4, **{"optimizer.storage": "pinned_host"})
    hbm = planned(values, tmp_path, "v5e:2x2")["plan"]["hbm_bytes_per_chip"]
    assert hbm["delta"] == 8  # merge/alpha and merge/alpha_total
    assert hbm["on_host"] == hbm["parameters"]
    # Arguments of the compiled step, less what it was to hold: nothing of the delta is among them.
    assert hbm["padding"] < 0.1 * hbm["on_host"]


def test_gpus_by_arithmetic_say_so_and_what_to_change(tmp_path, capsys):
    file = tmp_path / "plan.json"
    values = {**big("llama-3-8b", 16), "topology": "h100:1", "output_file": file}
    assert main(["plan", *flags(values)]) == 0
    shown = capsys.readouterr().out
    assert "no compiler for this machine" in shown
    assert "does not fit" in shown
    assert "trainer.gradient_accumulation_steps 2" in shown
    written = json.loads(file.read_text())
    hbm, parameters = written["plan"]["hbm_bytes_per_chip"], 8_030_261_248
    # Adam's moments are two copies in the type of the parameters, and the delta is one in bfloat16.
    assert hbm["parameters"] == hbm["delta"] - 12 == 2 * parameters
    assert hbm["optimizer"] == pytest.approx(4 * parameters, rel=1e-6)
    assert not written["plan"]["fits"]
    assert written["advice"]


def test_a_larger_slice_of_gpus_fits(tmp_path):
    file = tmp_path / "plan.json"
    values = {**big("llama-3-8b", 16), "topology": "gpu:8x80", "output_file": file}
    assert main(["plan", *flags(values)]) == 0
    plan = json.loads(file.read_text())["plan"]
    assert plan["fits"]
    assert plan["hbm_bytes_per_chip"]["parameters"] == pytest.approx(
        2 * 8_030_261_248 / 8, rel=1e-3
    )


def test_the_search_puts_the_fastest_that_fits_first(tmp_path, capsys):
    file = tmp_path / "plan.json"
    values = {**big("llama-3-8b", 32, **{"optimizer.delta_mask": "fixed"}), "topology": "h100:8"}
    assert main(["plan", *flags({**values, "output_file": file, "search": "true"})]) == 0
    found = json.loads(file.read_text())["search"]
    fits = [one["fits"] for one in found]
    assert fits == sorted(fits, reverse=True)
    assert fits[0]
    steps = [one["roofline_seconds"]["step"] for one in found if one["fits"]]
    assert steps == sorted(steps)
    tried = [one["settings"] for one in found]
    assert {one["model.remat"] for one in tried} == {"none", "weight_dots", "full"}
    assert {one["mesh.tensor"] for one in tried} == {1, 2, 4}
    assert any(one.get("optimizer.storage") == "sparse" for one in tried)
    assert any(one.get("trainer.gradient_accumulation_steps") == 2 for one in tried)
    best = found[0]["settings"]
    assert (
        f"mesh {best['mesh.data']}x{best['mesh.fsdp']}x{best['mesh.tensor']}"
        in capsys.readouterr().out
    )


@pytest.mark.slow
@needs_compiler
def test_the_search_compiles_for_a_slice_and_its_best_is_what_a_plan_says(tmp_path):
    """Four meshes with three policies, then two numbers of parts; without a merge, to save minutes."""
    values = tiny(tmp_path / "model", 32, **{"optimizer.name": "adamw"})
    for name in ("alpha", "density", "delta_dtype"):
        del values[f"optimizer.{name}"]
    file = tmp_path / "search.json"
    flagged = {**values, "topology": "v5e:2x2", "search": "true", "output_file": file}
    shown = run_with_compiler("-m", "train", "plan", *flags(flagged))
    found = json.loads(file.read_text())["search"]
    assert len(found) == 14
    assert {one["source"] for one in found} == {"compiler"}
    steps = [one["roofline_seconds"]["step"] for one in found]
    assert all(one["fits"] for one in found)
    assert steps == sorted(steps)
    best = found[0]["settings"]
    assert f"mesh {best['mesh.data']}x{best['mesh.fsdp']}x{best['mesh.tensor']}" in shown
    again = planned({**values, **best}, tmp_path, "v5e:2x2")["plan"]
    for name in ("hbm_bytes_per_chip", "step_per_chip", "roofline_seconds"):
        assert again[name] == found[0][name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v5p"}, "topology is 'v5p'; give a slice of TPUs"),
        ({"topology": "h100:8", "mesh.fsdp": 3}, "trainer.batch_size must be a multiple of 3"),
        ({"topology": "h100:8", "mesh.fsdp": 16}, "must be at most 8"),
        (
            {"topology": "h100:8", "model.path": "nowhere"},
            "model.path: .*or name one of llama-3-70b",
        ),
        ({"topology": "h100:8", "output_file": "README.md"}, "holds no plan, so it is kept"),
        ({"topology": "h100:8", "output_file": "no/such/plan.json"}, "there is no directory"),
        ({"topology": "cpu:1", "model.attention": "splash"}, "model.attention is splash, which"),
        (
            {"topology": "h100:8", "model.attention": "splash", "data.prefix_sharing": "false"},
            "model.attention is splash, which cannot be compiled for h100:8; use xla",
        ),
        ({"topology": "h100:8", "trainer.steps": 0}, "trainer.steps must be positive"),
    ],
)
def test_mistakes_name_the_field(changes, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", *flags({**big("llama-3-8b", 16), **changes})]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_program_that_the_compiler_refuses_has_the_memory_it_names():
    """In the words of libtpu 0.0.42, and of versions before it."""
    state = State(parameters=2.0**30, optimizer=0.0, delta=0.0, batch=0.0)
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (378.10G) exceeds available HBM (15.75G)."
    )
    whole = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm."
    assert refused_temporaries(temporaries, state) == pytest.approx(378.10 * 2**30)
    assert refused_temporaries(whole, state) == pytest.approx(20.5 * 2**30)
    assert refused_temporaries("INTERNAL: something else", state) is None


def test_a_plan_replaces_an_older_one_alone(tmp_path):
    file = tmp_path / "plan.json"
    check_output(file)
    file.write_text('{"format": "omerge_jax plan"}')
    check_output(file)
    file.write_text('{"format": "another"}')
    with pytest.raises(UserError, match="holds no plan"):
        check_output(file)


def test_meshes_of_machines_that_are_not_there():
    mesh = read_target("h200:16").mesh(MeshOptions(data=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 2}
