"""The generate command: text as transformers writes it, files, and mistakes."""

from __future__ import annotations

import json
from datetime import datetime

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.tiny_runs import flags, make_model_dir, make_records, write_jsonl
from train.cli import main
from train.generation.sampler import Sampler

GREEDY = {"max_new_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_dir(tmp_path_factory.mktemp("model"), 1)


def theirs(model, messages):
    """transformers' greedy answer after the chat template, or after plain text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = messages
    if not isinstance(messages, str):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    out = network.generate(
        **ids, do_sample=False, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def generate(model, **options):
    return main(["generate", *flags({"model": model, **options})])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("template", [True, False])
def test_a_prompt_is_answered_in_the_terminal(model, template, capsys):
    assert generate(model, prompt="7+5?", chat_template=template, **GREEDY) == 0
    prompt = [{"role": "user", "content": "7+5?"}] if template else "7+5?"
    assert capsys.readouterr().out == theirs(model, prompt) + "\n"


def test_a_file_of_prompts(model, tmp_path):
    records = make_records(5)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    out = tmp_path / "new" / "out.jsonl"
    assert generate(model, prompts=prompts, output=out, batch_size=2, **GREEDY) == 0
    found = lines(out)
    assert [one["generated"] for one in found] == [theirs(model, one["prompt"]) for one in records]
    assert all(one.items() >= record.items() for one, record in zip(found, records, strict=True))
    for one in found:
        assert (one["finish_reason"] == "length") or one["generated_tokens"] <= 12


def test_draws_depend_on_the_seed_and_not_on_the_batch(model, tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", make_records(3))
    texts = []
    for number, (size, seed) in enumerate([(1, 0), (4, 0), (4, 1)]):
        out = tmp_path / f"{number}.jsonl"
        options = {"batch_size": size, "seed": seed, "max_new_tokens": 8, "top_p": 0.9}
        assert generate(model, prompts=prompts, output=out, **options) == 0
        texts.append([one["generated"] for one in lines(out)])
    assert texts[0] == texts[1] != texts[2]


def test_an_interrupted_file_is_gone_on_with(model, tmp_path, monkeypatch, capsys):
    """The lines are those of a run in one go, in other batches, and the first ones stay as they are."""
    rows = [{**record, "at": datetime(2024, 2, 3)} for record in make_records(5)]
    prompts, out = tmp_path / "prompts.parquet", tmp_path / "out.jsonl"
    parquet.write_table(pyarrow.Table.from_pylist(rows), prompts)
    options = {"prompts": prompts, "max_new_tokens": 4, "top_p": 0.9}
    assert generate(model, output=tmp_path / "whole.jsonl", batch_size=2, **options) == 0
    sample, left = Sampler.__call__, iter([True, False, False, True, True])

    def interrupted(*arguments):
        if not next(left):
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(Sampler, "__call__", interrupted)
    assert generate(model, output=out, batch_size=3, **options) == 130
    (partial,) = tmp_path.glob("out.jsonl*")
    assert len(lines(partial)) == 3
    assert generate(model, output=out, seed=1, **options) == 130  # has a file of its own
    (other,) = set(tmp_path.glob("out.jsonl*")) - {partial}
    assert lines(other) == []
    with partial.open("a") as file:
        file.write('{"prompt": "cut o')
    capsys.readouterr()
    assert generate(model, output=out, batch_size=1, **options) == 0
    assert "3 records were written before; 2 are left." in capsys.readouterr().out
    assert not list(left)
    assert lines(out) == lines(tmp_path / "whole.jsonl")
    assert lines(out)[4]["at"] == "2024-02-03 00:00:00"
    assert not partial.exists()


def test_prompts_are_of_the_split_that_is_asked_for(model, tmp_path, monkeypatch, capsys):
    def load_dataset(name, configuration, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for options, split in (({}, "train"), ({"split": "validation"}, "validation")):
        assert generate(model, prompts="a/b", output=tmp_path / "o.jsonl", **options) == 2
        assert f"data set 'a/b', split '{split}'" in capsys.readouterr().err


def test_nothing_is_overwritten(model, tmp_path, capsys):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", make_records(1))
    out = tmp_path / "out.jsonl"
    out.write_text("kept")
    assert generate(model, prompts=prompts, output=out) == 2
    assert "output: " in capsys.readouterr().err
    assert out.read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of prompt and prompts"),
        ({"prompt": "a", "output": "o"}, "give both, or neither"),
        ({"prompt": "a", "top_p": 0.0}, r"top_p must be in (0, 1], got 0.0"),
        ({"prompt": "a", "max_new_tokens": 1000}, "more than the model's 256 positions"),
        ({"prompt": " "}, "prompt: record: field 'prompt' is empty"),
        ({"prompts": "none.jsonl", "output": "o.jsonl"}, "prompts: Data file none.jsonl"),
    ],
)
def test_mistakes_are_named(model, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate(model, **options) == 2
    assert message in capsys.readouterr().err


def test_further_end_tokens_of_the_model_end_a_row(model, tmp_path):
    record = {"prompt": "7+5?"}
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [record])
    assert generate(model, prompts=prompts, output=tmp_path / "free.jsonl", **GREEDY) == 0
    first = lines(tmp_path / "free.jsonl")[0]["generated"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = [{"role": "user", "content": "7+5?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    third = int(network.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=3)[0, -1])
    file = model / "generation_config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps({"eos_token_id": [third]}))
        assert generate(model, prompts=prompts, output=tmp_path / "ended.jsonl", **GREEDY) == 0
    finally:
        file.write_text(before)
    ended = lines(tmp_path / "ended.jsonl")[0]
    assert ended["finish_reason"] == "stop"
    assert ended["generated_tokens"] <= 3
    assert first.startswith(ended["generated"])
