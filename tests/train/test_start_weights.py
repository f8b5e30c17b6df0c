"""The weights that a run starts from are read once, and only what is needed stays in memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.train.tiny_runs import run_flags, write_inputs
from train.cli import configured
from train.config import DPOConfig
from train.data import tokenize_preference
from train.runs.run import Run
from train.runs.set_up import set_up
from train.runs.start_weights import StartWeights


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def make_run(inputs: dict[str, str], output, **changes) -> Run:
    config = configured("dpo", DPOConfig, run_flags(inputs, output, **changes))
    run = set_up("dpo", config, tokenize_preference)
    assert run is not None
    return run


def test_weights_are_let_go_as_soon_as_the_state_holds_them(inputs, tmp_path):
    weights = StartWeights(make_run(inputs, tmp_path / "run"), scores_answers=False)
    assert weights.loaded is None
    first = weights.load()
    assert weights.load() is first
    state = weights.start()
    assert (weights.loaded, weights.frozen, weights.whole_reference) == (None, {}, None)
    assert weights.merged_models == {}
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), weights.abstract_state())


def test_a_reference_that_scores_answers_stays_beside_frozen_weights(inputs, tmp_path):
    run = make_run(inputs, tmp_path / "run", model__freeze="[embed_tokens]")
    weights = StartWeights(run, scores_answers=True)
    first = weights.load()
    state = weights.start()
    assert "embed_tokens" in weights.frozen
    assert "embed_tokens" not in state["params"]
    jax.tree.map(np.testing.assert_array_equal, weights.whole_reference, first)


def test_a_run_that_goes_on_reads_nothing_that_it_has_no_use_for(inputs, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(StartWeights, "load", lambda self: read.append("model"))
    StartWeights(make_run(inputs, tmp_path / "run"), scores_answers=False).resume()
    assert not read
