"""Packed rows: which examples share one as TRL decides it, and what they cost as transformers says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.data_utils import pack_dataset

from tests.train.tiny_runs import (
    flags,
    make_model_dir,
    make_tokenizer,
    read_tensors,
    write_inputs,
    write_jsonl,
)
from train.cli import main
from train.data import TokenDataset, make_buckets, make_loader, mix, pack, tokenize_sft
from train.data.packing import best_fit_decreasing
from train.files.metrics_log import read_metrics
from train.models import from_hf, merge_model, split_model
from train.objectives.accumulate import loss_and_gradient
from train.objectives.sft import packed_statistics, sft_loss

LENGTH = 64


def make_examples(count: int, seed: int = 0) -> TokenDataset:
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefgh "))

    def text(largest: int) -> str:
        return "x" + "".join(rng.choice(letters, rng.integers(largest)))

    records = [{"prompt": text(20), "completion": text(36)} for _ in range(count)]
    return tokenize_sft(records, make_tokenizer(), max_prompt_length=24, max_completion_length=40)


def examples_of(columns: Mapping[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of every example of padded columns."""
    names = [f"{kind}_{what}" for kind in ("prompt", "completion") for what in ("tokens", "mask")]
    rows = zip(*(columns[name] for name in names), strict=True)
    return [(prompt[real].tolist(), answer[said].tolist()) for prompt, real, answer, said in rows]


def unpacked(data: TokenDataset) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of every example of packed rows."""
    found = []
    for ids, parts, places in zip(
        *(data.arrays[f"packed_{name}"] for name in ("ids", "parts", "from")), strict=True
    ):
        scored = places[places >= 0] + 1
        for part in range(parts.max() + 1):
            where = np.flatnonzero(parts == part)
            assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
            answer = np.intersect1d(where, scored)
            assert np.array_equal(answer, where[-len(answer) :])
            found.append((ids[where[: -len(answer)]].tolist(), ids[answer].tolist()))
    return found


@pytest.mark.parametrize(
    "lengths",
    [
        np.random.default_rng(0).integers(1, LENGTH + 1, 400),
        np.random.default_rng(1).geometric(0.1, 400).clip(1, LENGTH),
        [LENGTH] * 3 + [1] * 70,
    ],
)
def test_rows_are_those_of_trl(lengths):
    ids = [[number] * length for number, length in enumerate(lengths)]
    theirs = pack_dataset(Dataset.from_dict({"input_ids": ids}), LENGTH, strategy="bfd")
    expected = [list(dict.fromkeys(row)) for row in theirs["input_ids"]]
    assert best_fit_decreasing(lengths, LENGTH) == expected


def test_no_example_is_lost_or_cut():
    data = make_examples(60)
    packed = pack(data, LENGTH)
    assert sorted(unpacked(packed)) == sorted(examples_of(data.arrays))
    fill = (packed.arrays["packed_parts"] >= 0).sum(axis=1)
    assert fill.max() <= LENGTH
    assert len(packed) < len(data)
    with pytest.raises(ValueError, match=r"an example has \d+ tokens, and a row holds 16"):
        pack(data, 16)
    assert packed.fingerprint() != pack(make_examples(60, seed=1), LENGTH).fingerprint()


def test_weights_of_a_mixture_stay():
    parts = [make_examples(40), make_examples(20, seed=1)]
    packed = pack(mix(parts, [1.0, 0.5]), LENGTH)
    sizes = [len(pack(part, LENGTH)) for part in parts]
    assert packed.parts == ((sizes[0], sizes[0]), (sizes[1], round(sizes[1] / 2)))
    assert sorted(unpacked(packed)) == sorted(
        examples_of(parts[0].arrays) + examples_of(parts[1].arrays)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = make_model_dir(tmp_path_factory.mktemp("model"), 3)
    graphdef, params = split_model(from_hf(str(directory)))
    return graphdef, params, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def batches():
    """The same 16 examples, in rows of one and in rows of several, an even number of them."""
    data = make_examples(16)
    packed = pack(data, LENGTH)
    filler = {name: column[:1] for name, column in packed.arrays.items()}
    filler["packed_from"] = np.full_like(filler["packed_from"], -1)  # adds no token
    columns = {
        name: np.concatenate([column, filler[name]]) if len(packed) % 2 else column
        for name, column in packed.arrays.items()
    }
    return {name: column for name, column in data.arrays.items() if name != "index"}, columns


def test_every_token_is_scored_as_by_transformers_alone(model, batches):
    graphdef, params, theirs = model
    columns = batches[1]
    score = jax.jit(lambda p, b: packed_statistics(merge_model(graphdef, p), b).logps)
    logps = score(params, columns)
    logps, compared = np.asarray(logps), 0
    for ids, parts, places, found in zip(
        *(columns[f"packed_{name}"] for name in ("ids", "parts", "from")), logps, strict=True
    ):
        assert (found[places < 0] == 0).all()
        for part in np.unique(parts[places[places >= 0]]):
            where = np.flatnonzero(parts == part)
            with torch.no_grad():
                alone = theirs(torch.tensor(ids[where][None].astype(np.int64))).logits[0]
            expected = torch.log_softmax(alone, -1).numpy()
            mine = (places >= 0) & (parts[np.maximum(places, 0)] == part)
            targets, inside = ids[places[mine] + 1], places[mine] - where[0]
            np.testing.assert_allclose(found[mine], expected[inside, targets], atol=2e-5)
            compared += int(mine.sum())
    assert compared == batches[0]["completion_mask"].sum()


def test_loss_and_gradient_are_those_of_separate_rows(model, batches):
    graphdef, params, theirs = model
    plain, packed = batches
    loss_fn = sft_loss(graphdef)
    (expected, metrics), gradient = jax.jit(loss_and_gradient(loss_fn))(params, plain)
    for parts in (1, 2):
        (loss, found), ours = jax.jit(loss_and_gradient(loss_fn, parts))(params, packed)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        for name, value in metrics.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-5)
        for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * float(np.abs(other).max()))
    total = 0.0
    for prompt, answer in examples_of(plain):
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += float(theirs(ids, labels=labels).loss) * len(answer)
    assert float(expected) == pytest.approx(total / plain["completion_mask"].sum(), rel=1e-5)


def test_loader_shares_and_resumes():
    packed = pack(mix([make_examples(60), make_examples(30, seed=1)], [1.0, 0.5]), LENGTH)
    settings = {"seed": 3, "buckets": make_buckets(packed, 4)}
    whole = make_loader(packed, 4, **settings)
    shares = [make_loader(packed, 4, shard=((index,), 2), **settings) for index in (0, 1)]
    for _ in range(9):
        batch, halves = next(whole), [next(share) for share in shares]
        for name, column in batch.items():
            together = np.concatenate([half[name] for half in halves])
            np.testing.assert_array_equal(together, column)
    state, expected = json.loads(json.dumps(whole.get_state())), next(whole)
    again = make_loader(packed, 4, **settings)
    again.set_state(state)
    assert np.array_equal(next(again)["packed_ids"], expected["packed_ids"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    made = write_inputs(directory)
    lines = [{"prompt": f"{n}?", "completion": "1" * (1 + n % 23)} for n in range(32)]
    return made | {"lines": str(write_jsonl(directory / "lines.jsonl", lines))}


def sft(inputs, output, **changes) -> list[str]:
    values = {
        "model.path": inputs["model"],
        "data.path": inputs["lines"],
        "data.max_prompt_length": 8,
        "data.max_completion_length": 24,
        "optimizer.learning_rate": 1e-3,
        "trainer.steps": 3,
        "trainer.batch_size": 32,
        "output_dir": output,
    }
    return flags(values | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.slow
def test_a_run_goes_where_the_unpacked_one_goes(inputs, tmp_path, capsys):
    """With all examples in every batch, packed or not, both take the same steps."""
    tokens = sum(len(f"{n}?") + 1 + n % 23 + 1 for n in range(32))  # a byte each, and the end
    dry = {"data__packing": "true", "dry_run": "true", "trainer__batch_size": 1}
    assert main(["sft", *sft(inputs, tmp_path / "dry", **dry)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    rows = int(shown.split("Packed: 32 examples in ")[1].split()[0])
    padding = 1 - tokens / (rows * 32)
    assert f"in {rows} rows of 32 tokens, padding {padding:.1%}" in shown
    assert main(["sft", *sft(inputs, tmp_path / "plain", data__buckets=1)]) == 0
    packed = {"data__packing": "true", "trainer__batch_size": rows}
    assert main(["sft", *sft(inputs, tmp_path / "packed", **packed)]) == 0
    (logged, *_), (other, *_) = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("packed", "plain")
    )
    assert logged["padding_share"] == pytest.approx(padding)
    assert logged["padding_share"] < other["padding_share"] / 2
    start, expected, found = (
        read_tensors(path)
        for path in (Path(inputs["model"]), tmp_path / "plain/export", tmp_path / "packed/export")
    )
    for name, value in expected.items():
        moved = np.abs(value - start[name]).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=max(1e-2 * moved, 1e-6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__packing": "true", "data__packed_length": 20},
            "data.packed_length: an example has",
        ),
        ({"data__packed_length": 64}, "data.packed_length is 64, but data.packing is not set"),
        ({"data__packing": "true", "data__buckets": 4}, "data.buckets is 4, but packed rows"),
        (
            {"data__packing": "true", "data__packed_length": 0},
            "data.packed_length must be positive",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(inputs, tmp_path, capsys, changes, message):
    assert main(["sft", *sft(inputs, tmp_path / "run", **changes)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
