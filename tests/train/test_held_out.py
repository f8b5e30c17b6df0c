"""Held-out metrics equal those of one row at a time, whatever the batch and its padding."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import numpy as np
import pytest

from tests.train.tiny_runs import make_model_dir, make_records, make_tokenizer
from train.data import tokenize_preference, tokenize_sft
from train.evaluation.held_out import (
    answer_logps,
    bucketed_batches,
    evaluate_preferences,
    evaluate_sft,
)
from train.losses import PreferenceLoss
from train.models import from_hf, merge_model, split_model
from train.objectives.preference import reference_logps_fn
from train.objectives.sft import sft_loss

LENGTH = 80
tokenize = partial(tokenize_preference, max_prompt_length=64, max_completion_length=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return split_model(from_hf(make_model_dir(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def pairs():
    return tokenize(make_records(13), make_tokenizer())


@pytest.fixture(scope="module")
def examples():
    records = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in make_records(13)]
    return tokenize_sft(records, make_tokenizer(), max_prompt_length=64, max_completion_length=16)


@cache
def _compiled(graphdef):
    return jax.jit(lambda params, t: jax.nn.log_softmax(merge_model(graphdef, params)(t[None])[0]))


def log_softmax_of(model):
    graphdef, params = model
    return partial(_compiled(graphdef), params)


def token_logps_alone(model, dataset, row: int, kind: str) -> np.ndarray:
    """Log-probabilities of one answer from plain logits, without any mask."""
    arrays = dataset.arrays
    prompt = arrays["prompt_tokens"][row][arrays["prompt_mask"][row]]
    answer = arrays[f"{kind}_tokens"][row][arrays[f"{kind}_mask"][row]]
    # No token sees those after it, so zeros behind change nothing but the number of compilations.
    tokens = np.zeros(LENGTH, np.int32)
    tokens[: len(prompt) + len(answer)] = [*prompt, *answer]
    logps = np.asarray(log_softmax_of(model)(tokens), np.float64)
    return logps[np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1), answer]


def test_every_row_comes_once_and_keeps_its_tokens(pairs):
    arrays, seen = pairs.arrays, []
    for rows, batch in bucketed_batches(pairs, 4):
        seen += rows.tolist()
        assert all(len(column) == 4 for column in batch.values())
        for place, row in enumerate(rows):
            for kind in ("prompt", "chosen", "rejected"):
                tokens = batch[f"{kind}_tokens"][place][batch[f"{kind}_mask"][place]]
                wanted = arrays[f"{kind}_tokens"][row][arrays[f"{kind}_mask"][row]]
                np.testing.assert_array_equal(tokens, wanted)
        assert not batch["chosen_mask"][len(rows) :].any()
    assert sorted(seen) == list(range(len(pairs)))
    assert arrays["chosen_mask"].any(axis=1).all()  # the data set itself is as it was


@pytest.mark.parametrize("share_prompts", [True, False])
def test_answer_logps_are_those_of_each_row_alone(model, pairs, share_prompts):
    graphdef, params = model
    pairs = dataclasses.replace(pairs, share_prompts=share_prompts)
    found = answer_logps(reference_logps_fn(graphdef), params, pairs, 4, None)
    for kind, logps in zip(("chosen", "rejected"), found, strict=True):
        wanted = [token_logps_alone(model, pairs, row, kind).sum() for row in range(len(pairs))]
        np.testing.assert_allclose(logps, wanted, rtol=1e-5)


def test_preference_metrics_are_exact_means(model, pairs):
    graphdef, params = model
    score = reference_logps_fn(graphdef)
    reference = {"chosen": np.linspace(-60, -20, 13), "rejected": np.linspace(-10, -40, 13)}
    columns = {
        f"reference_{kind}_logps": logps.astype(np.float32) for kind, logps in reference.items()
    }
    evaluate = evaluate_preferences(
        score,
        pairs.with_columns(**columns),
        batch_size=4,
        mesh=None,
        loss=PreferenceLoss("sigmoid", beta=0.3),
    )
    rewards = {
        kind: 0.3
        * (
            np.array([token_logps_alone(model, pairs, row, kind).sum() for row in range(13)])
            - reference[kind]
        )
        for kind in reference
    }
    margins = rewards["chosen"] - rewards["rejected"]
    metrics = evaluate(params)
    assert 0 < metrics["eval_rewards/accuracies"] < 1
    assert metrics["eval_rewards/accuracies"] == pytest.approx(np.mean(margins > 0))
    assert metrics["eval_rewards/margins"] == pytest.approx(margins.mean(), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)


def test_sft_loss_is_the_mean_over_all_tokens(model, examples):
    graphdef, params = model
    metrics = evaluate_sft(sft_loss(graphdef), examples, batch_size=4, mesh=None)(params)
    logps = [token_logps_alone(model, examples, row, "completion") for row in range(len(examples))]
    assert len({len(row) for row in logps}) > 1  # else a mean of batch means would pass as well
    assert metrics["eval_loss"] == pytest.approx(-np.concatenate(logps).mean(), rel=1e-5)
