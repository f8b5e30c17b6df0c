"""The suite: its deltas, selection and statistics by hand or against scipy, and a tiny run resumed."""

import dataclasses
import fcntl
import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from train.config import UserError
from train.taxbench.miniature.sizes import Sizes
from train.taxbench.miniature.training import Lab
from train.taxbench.suite import run as suite
from train.taxbench.suite.candidates import candidates, controls
from train.taxbench.suite.deltas import make_delta
from train.taxbench.suite.directory import own_directory
from train.taxbench.suite.outcome import TaxbenchConfig
from train.taxbench.suite.recipes import Merge, Recipe, optimizer
from train.taxbench.suite.report import report_text
from train.taxbench.suite.run import Suite, run_suite, run_taxbench
from train.taxbench.suite.runner import Runner
from train.taxbench.suite.selection import Entry, choose, entries, narrowed
from train.taxbench.suite.statistics import Results, mean_sd, paired
from train.taxbench.suite.studies import studies


def _record(run, seed, reward, capability, merge=None):
    return {"run": run, "merge": merge, "seed": seed, "reward": reward, "capability": capability}


RESULTS = Results(
    [
        _record("a", 1, [0.0, 0.5, 1.0], [0.9, 0.8, 0.6]),
        _record("a", 2, [0.0, 0.5, 1.0], [0.9, 0.7, 0.5]),
        _record("b", 1, [0.0, 0.5, 0.6], [0.9, 0.9, 0.9]),
        _record("b", 2, [0.0, 0.5, 1.0], [0.9, 0.9, 0.9]),
    ]
)


def test_matched_capability_of_every_seed():
    np.testing.assert_allclose(RESULTS.matched(("a", None), [1, 2], 0.75), [0.7, 0.6])
    np.testing.assert_array_equal(
        RESULTS.matched(("b", None), [1, 2, 3], 0.75), [np.nan, 0.9, np.nan]
    )
    np.testing.assert_array_equal(RESULTS.last(("b", None), [1]), [[0.6, 0.9]])


def test_paired_differences_are_those_of_a_t_test_on_common_seeds():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 9))
    second[3] = np.nan
    found, both = paired(first, second), np.isfinite(second)
    gap = (first - second)[both]
    t = gap.mean() / (gap.std(ddof=1) / np.sqrt(8))
    assert (found.n, found.mean) == (8, pytest.approx(gap.mean()))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 7))
    assert np.isnan(paired(first[:1], second[:1]).p)
    assert mean_sd(np.array([np.nan, 1.0, 3.0])) == (2.0, pytest.approx(np.sqrt(2)), 2)


def test_settings_that_miss_the_level_lose_to_those_that_reach_it():
    rows = [Entry("g", "g", name, (name, None)) for name in ("b", "a")]
    # b is better wherever it arrives, but arrives on one seed only.
    assert choose(rows, RESULTS, [1, 2], 0.75)[0].settings == "a"
    assert choose(rows, RESULTS, [2], 0.75)[0].settings == "b"


def test_only_what_was_chosen_is_run_again():
    merges = (Merge("x", "X", "linear"), Merge("y", "Y", "slerp"))
    recipes = [
        Recipe("g", "g", optimizer(), merges=merges),
        Recipe("g", "g", optimizer(learning_rate=1.0)),
    ]
    rows = entries(recipes, 10)
    assert [row.key[1] for row in rows] == [None, "x", "y", None]
    kept = narrowed(recipes, [rows[2]])
    assert kept == [dataclasses.replace(recipes[0], merges=merges[1:])]


def test_labels_do_not_change_a_fingerprint_and_settings_do():
    recipe = Recipe("g", "label", optimizer())
    same = dataclasses.replace(recipe, group="h", label="other", control=True)
    assert recipe.fingerprint() == same.fingerprint()
    others = [dataclasses.replace(recipe, **change) for change in ({"beta": 0.2}, {"ema": 0.9})]
    assert len({recipe.fingerprint(), *(other.fingerprint() for other in others)}) == 3


def test_every_method_has_four_settings():
    counts: dict[str, int] = {}
    for recipe in candidates():
        counts[recipe.group] = counts.get(recipe.group, 0) + 1
    assert set(counts.values()) == {4}
    for study in studies():
        assert len({(recipe.group, recipe.label) for recipe in study.recipes}) == len(study.recipes)


@pytest.fixture(scope="module")
def models():
    lab = Lab()
    return [jax.tree.map(np.asarray, lab.fresh_params(seed)) for seed in range(3)]


def _leaves(tree):
    return dict(jax.tree_util.tree_flatten_with_path(tree)[0])


def test_deltas_are_what_they_are_called(models):
    base, earlier, sft = models
    tau, *others = (
        make_delta(kind, base, sft, earlier, 0)
        for kind in (
            "tau",
            "negative",
            "permuted",
            "random",
            "earlier",
            "low_rank",
            "attention",
            "mlp",
        )
    )
    negative, permuted, random, half, low_rank, attention, mlp = map(_leaves, others)
    for path, whole in _leaves(tau).items():
        whole = np.asarray(whole)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        np.testing.assert_array_equal(negative[path], -whole)
        np.testing.assert_array_equal(half[path], _leaves(earlier)[path] - _leaves(base)[path])
        tensors = whole if name.startswith("layers") else whole[None]
        for index, tensor in enumerate(tensors):
            at = index if name.startswith("layers") else ...
            shuffled = np.asarray(permuted[path])[at]
            np.testing.assert_array_equal(np.sort(shuffled, axis=None), np.sort(tensor, axis=None))
            noise = np.asarray(random[path])[at]
            assert np.linalg.norm(noise) == pytest.approx(
                np.linalg.norm(tensor), rel=1e-5, abs=1e-9
            )
            if tensor.ndim == 2:
                assert np.linalg.matrix_rank(np.asarray(low_rank[path])[at], tol=1e-4) == 4
        for part, module in ((attention, "self_attn"), (mlp, "mlp")):
            expected = whole if module in name else np.zeros_like(whole)
            np.testing.assert_array_equal(part[path], expected)


def test_controls_change_one_thing():
    recipe = next(r for r in candidates() if r.group == "on_ties")
    zero, *others = controls(recipe)
    assert zero.optimizer.alpha == 1e-9
    assert {other.delta for other in others} == {"permuted", "negative", "random"}
    assert all(other.optimizer == recipe.optimizer for other in others)


TINY = {"base_steps": 2, "sft_steps": 2, "steps": 2, "eval_every": 1, "pairs": 64, "questions": 1}


@pytest.mark.slow
def test_a_suite_runs_reports_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(suite.SUITES, "demo", Suite(1, 2, 1, groups=("adamw", "on_ties")))
    whole = suite.studies
    monkeypatch.setattr(suite, "studies", lambda: [s for s in whole() if s.name == "step-k"])
    config = TaxbenchConfig(output_dir=str(tmp_path / "out"), reward=0.01, workers=2, **TINY)
    directory = run_taxbench(config)
    results = (directory / "results.jsonl").read_text().splitlines()
    report = (directory / "report.md").read_text()
    for text in (
        "OnTIES",
        "Control: AdamW + λτ",
        "τ permuted",
        "every K-th step",
        "seeds 1, 2",
        "over K = 1",
        "| method | over OnTIES | p |",
    ):
        assert text in report
    # A second run finds everything; a lost line is made again, with the same numbers.
    lost = json.loads(results[-1])
    (directory / "results.jsonl").write_text("\n".join(results[:-1]) + '\n{"cut": {"of": 1}')
    run_taxbench(config)
    again = [
        json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()[-1:]
    ]
    assert again[0]["capability"] == lost["capability"]
    assert again[0]["reward"] == lost["reward"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": 1.0}, "reward must be between 0 and 1"),
        ({"workers": 0}, "workers must be positive"),
        ({"steps": 25}, "eval_every must divide steps"),
        ({"pairs": 3}, "pairs must be 64 or larger"),
    ],
)
def test_bad_settings_stop_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_taxbench(TaxbenchConfig(output_dir=str(tmp_path / "out"), **settings))
    assert not (tmp_path / "out").exists()


def test_published_report_is_made_of_the_published_results(tmp_path):
    published = Path(__file__).parents[2] / "docs/taxbench"
    with gzip.open(published / "results.jsonl.gz") as file:
        (tmp_path / "results.jsonl").write_bytes(file.read())
    config = TaxbenchConfig(output_dir=str(tmp_path), suite="paper")

    class Complete(Runner):
        def _pool(self):
            pytest.fail("a published result is not found under its fingerprint")

    runner = Complete(tmp_path, Sizes.of(config), 1, Console(quiet=True))
    assert report_text(run_suite(config, runner)) + "\n" == (published / "report.md").read_text()


def test_a_directory_has_one_process_at_a_time(tmp_path):
    with own_directory(str(tmp_path / "out"), "study.json", {"size": (1, 2)}, "") as directory:
        assert json.loads((directory / "study.json").read_text()) == {"size": [1, 2]}
    with (directory / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match="is in use by process"),
            own_directory(str(directory), "study.json", {"size": (1, 2)}, ""),
        ):
            pass


def test_results_of_other_sizes_are_not_mixed(tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps({"steps": 80}))
    with pytest.raises(UserError, match="other settings of base_steps"):
        run_taxbench(TaxbenchConfig(output_dir=str(tmp_path)))
    (tmp_path / "sizes.json").rename(tmp_path / "mine.json")
    with pytest.raises(UserError, match="holds other files"):
        run_taxbench(TaxbenchConfig(output_dir=str(tmp_path)))
