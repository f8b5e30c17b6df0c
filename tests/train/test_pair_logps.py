"""A prompt computed once for both answers scores them as two rows would, here and in transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.train.tiny_models import VOCAB, save_model
from train.data.layout import Widths, row_lengths, share_prompt, trim
from train.data.padding import pad_rows
from train.models import from_hf, merge_model, split_model
from train.objectives.pair_logps import attention_of_parts, pair_token_logps
from train.objectives.preference import preference_loss, reference_logps_fn

LENGTHS = [(7, 5, 3), (1, 1, 6), (4, 6, 6), (9, 2, 1)]  # prompt, chosen, rejected


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    batch = {}
    for part, name in enumerate(("prompt", "chosen", "rejected")):
        rows = [rng.integers(3, VOCAB, lengths[part]).tolist() for lengths in LENGTHS]
        left = name == "prompt"
        columns = pad_rows(rows, 12 if left else 8, 0, left=left)
        batch[f"{name}_tokens"], batch[f"{name}_mask"] = columns
    return batch


def shared(batch, joined=24, scored=16):
    return share_prompt(batch, Widths(12, 8, joined, scored))


@pytest.fixture(
    scope="module",
    params=["llama-gqa-theta1e4", pytest.param("qwen2-tied", marks=pytest.mark.slow)],
)
def models(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    theirs = save_model(request.param, path)
    return theirs, *split_model(from_hf(path))


def answer_logps(theirs, batch, row, name):
    """transformers' log-probabilities of one answer, alone behind its prompt, without padding."""
    prompt = batch["prompt_tokens"][row][batch["prompt_mask"][row]]
    answer = batch[f"{name}_tokens"][row][batch[f"{name}_mask"][row]]
    logits = theirs(torch.tensor(np.concatenate([prompt, answer])[None], dtype=torch.long)).logits
    logps = torch.log_softmax(logits[0, len(prompt) - 1 : -1].double(), -1)
    return logps.gather(1, torch.tensor(answer, dtype=torch.long)[:, None])[:, 0]


@pytest.mark.parametrize("vocab_chunk", [None, 40])
def test_log_probabilities_are_those_of_transformers_and_of_repeated_prompts(models, vocab_chunk):
    theirs, graphdef, params = models
    batch = make_batch()

    def logps(params, batch):
        return pair_token_logps(merge_model(graphdef, params), batch, vocab_chunk=vocab_chunk)

    once, twice = jax.jit(logps)(params, shared(batch)), jax.jit(logps)(params, batch)
    assert once.shape == twice.shape == (8, 8)
    np.testing.assert_allclose(once, twice, atol=1e-5)
    with torch.no_grad():
        for row in range(4):
            for offset, name in ((0, "chosen"), (4, "rejected")):
                expected = answer_logps(theirs, batch, row, name).numpy()
                found = np.asarray(once[offset + row])
                np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-5)
                assert not found[len(expected) :].any()


def test_gradients_are_those_of_repeated_prompts(models):
    theirs, graphdef, params = models
    batch = make_batch()
    chosen, rejected = reference_logps_fn(graphdef)(params, batch)
    # A reference apart from the policy, so that no pair's gradient has the trivial weight 1/2.
    batch |= {"reference_chosen_logps": chosen - 3, "reference_rejected_logps": rejected + 5}
    grad = jax.jit(jax.value_and_grad(preference_loss(graphdef), has_aux=True))
    (loss, _), once = grad(params, shared(batch))
    (expected, _), twice = grad(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for ours, plain in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5 * float(jnp.abs(plain).max()))

    def margin(row):
        return (
            answer_logps(theirs, batch, row, "chosen").sum()
            - answer_logps(theirs, batch, row, "rejected").sum()
            - float(batch["reference_chosen_logps"][row] - batch["reference_rejected_logps"][row])
        )

    theirs.zero_grad()
    loss = -sum(torch.nn.functional.logsigmoid(0.1 * margin(row)) for row in range(4)) / 4
    loss.backward()
    weight = theirs.model.embed_tokens.weight.grad.numpy()
    np.testing.assert_allclose(once["embed_tokens"], weight, atol=1e-5 * np.abs(weight).max())


def test_the_rejected_answer_does_not_see_the_chosen_one(models):
    _, graphdef, params = models
    batch = make_batch()
    other = {**batch, "chosen_tokens": (batch["chosen_tokens"] + 7) % VOCAB}
    logps = jax.jit(lambda params, batch: pair_token_logps(merge_model(graphdef, params), batch))
    first, second = logps(params, shared(batch)), logps(params, shared(other))
    np.testing.assert_array_equal(first[4:], second[4:])
    assert np.abs(first[:4] - second[:4]).max() > 0.1


def test_a_policy_that_is_its_reference_has_rewards_of_zero(models):
    _, graphdef, params = models
    batch = shared(make_batch())
    chosen, rejected = reference_logps_fn(graphdef)(params, batch)
    scored = batch | {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
    _, metrics = jax.jit(preference_loss(graphdef))(params, scored)
    assert float(metrics["rewards/chosen"]) == float(metrics["rewards/rejected"]) == 0
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)


def test_rows_hold_every_token_once_without_gaps():
    batch = make_batch()
    lengths = row_lengths(batch)
    joined = share_prompt(batch, Widths(9, 6, 16, 12))
    for row, (prompt, chosen, rejected) in enumerate(LENGTHS):
        total = prompt + chosen + rejected
        parts = [0] * prompt + [1] * chosen + [2] * rejected + [-1] * (16 - total)
        assert joined["joined_parts"][row].tolist() == parts
        tokens = [batch[f"{n}_tokens"][row][batch[f"{n}_mask"][row]] for n in ("prompt", "chosen")]
        np.testing.assert_array_equal(
            joined["joined_ids"][row][: prompt + chosen], np.hstack(tokens)
        )
        assert (lengths.prompt[row], lengths.scored[row]) == (prompt, chosen + rejected)
    with pytest.raises(IndexError):
        share_prompt(batch, Widths(9, 6, 15, 12))


def test_trimmed_columns_keep_every_token():
    batch = make_batch()
    cut = trim(batch, Widths(9, 6, 16, 12))
    assert cut["prompt_tokens"].shape == (4, 9)
    assert cut["chosen_mask"].shape == (4, 6)
    for name in ("prompt_mask", "chosen_mask", "rejected_mask"):
        np.testing.assert_array_equal(cut[name].sum(axis=1), batch[name].sum(axis=1))


def test_positions_count_on_from_the_prompt():
    positions, visible = attention_of_parts(jnp.array([[0, 0, 1, 2, 2, -1]]))
    assert positions[0, :5].tolist() == [0, 1, 2, 2, 3]
    expected = np.tril(np.ones((6, 6), bool))
    expected[3:5, 2] = False  # rejected → chosen
    expected[5, 2:5] = False  # padding → answers
    np.testing.assert_array_equal(visible[0], expected)


def test_a_mask_beside_visibility_is_refused(models):
    _, graphdef, params = models
    model = merge_model(graphdef, params)
    tokens, visible = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2, 2), bool)
    with pytest.raises(ValueError, match="visible needs positions"):
        model.hidden(tokens, visible=visible)
