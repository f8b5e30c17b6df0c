"""Sampled pairs: reproducible draws, ranking, and a step's figures against TRL's online trainer."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from tests.train.tiny_runs import make_records, make_tokenizer
from train.data import tokenize_prompts
from train.generation.filters import Filters
from train.generation.sampler import Sampler
from train.losses import PreferenceLoss
from train.models import from_hf, split_model
from train.objectives.preference import preference_loss, reference_logps_fn
from train.on_policy.rollouts import OnPolicy, rank, with_objectives

BETA, NEW, ROWS, PENALTY = 0.1, 6, 4, 2.5
EOS = 1


def vowels(completions, **kwargs):
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(len(text) + 3 * sum(map(text.count, "aeiou"))) for text in texts]


def make_model(seed, path):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=EOS,
        bos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    return model, *split_model(from_hf(path))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_model(0, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return make_model(1, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def prompts():
    limits = {"max_prompt_length": 64, "max_completion_length": NEW}
    dataset = tokenize_prompts(make_records(ROWS), make_tokenizer(), **limits)
    return dict(dataset.arrays)


def on_policy(graphdef, *, ends=(EOS,), seed=0, penalty=None, filters=None):
    filters = Filters() if filters is None else filters
    sampler = Sampler(graphdef, NEW, ends, EOS, filters)
    return OnPolicy(
        sampler,
        make_tokenizer(),
        lambda answers: np.array(vowels(answers.completions)),
        missing_eos_penalty=penalty,
        seed=seed,
    )


# Tokens that end an answer often, so that answers of many lengths come.
OFTEN = tuple(range(1, 90))


def test_draws_are_those_of_seed_and_step(policy, prompts):
    _, graphdef, params = policy
    sampled, other = (on_policy(graphdef, ends=OFTEN, seed=seed) for seed in (0, 1))
    one, again = (sampled.pairs(params, prompts, 3, share=False) for _ in range(2))
    assert one.keys() == again.keys()
    for name, column in one.items():
        np.testing.assert_array_equal(column, again[name])
    for source, step in ((other, 3), (sampled, 4)):
        found = source.pairs(params, prompts, step, share=False)
        assert (found["chosen_tokens"] != one["chosen_tokens"]).any()


def test_answers_are_those_that_were_sampled_and_the_better_one_is_chosen(policy, prompts):
    _, graphdef, params = policy
    sampled = on_policy(graphdef, ends=OFTEN, penalty=PENALTY)
    pairs = sampled.pairs(params, prompts, 0, share=False)
    tokenizer = make_tokenizer()
    ends = np.concatenate([pairs["chosen_ended"], pairs["rejected_ended"]])
    assert 0 < ends.mean() < 1
    for name in ("chosen", "rejected"):
        tokens, mask = pairs[f"{name}_tokens"], pairs[f"{name}_mask"]
        texts = tokenizer.batch_decode(
            [row[used].tolist() for row, used in zip(tokens, mask, strict=True)],
            skip_special_tokens=True,
        )
        last = np.array([row[used][-1] for row, used in zip(tokens, mask, strict=True)])
        ended = np.isin(last, OFTEN)
        np.testing.assert_array_equal(pairs[f"{name}_ended"], ended)
        expected = np.array(vowels(texts)) - PENALTY * ~ended
        np.testing.assert_allclose(pairs[f"{name}_scores"], expected)
        # Nothing follows the end.
        assert (np.diff(mask.astype(int), axis=1) <= 0).all()
    assert (pairs["chosen_scores"] >= pairs["rejected_scores"]).all()
    assert (pairs["chosen_scores"] > pairs["rejected_scores"]).any()


def test_rank_matches_scores_and_takes_the_first_of_equals():
    scores = np.random.default_rng(0).integers(0, 3, 40).astype(float)
    chosen, rejected = rank(scores)
    np.testing.assert_array_equal(scores[chosen], scores.reshape(2, 20).max(axis=0))
    np.testing.assert_array_equal(np.sort(np.concatenate([chosen, rejected])), np.arange(40))
    equal = scores[:20] == scores[20:]
    assert equal.any()
    assert (chosen[equal] < 20).all()


def step_of(policy, batch):
    """Loss, metrics and gradient norm of one step."""
    _, graphdef, params = policy
    loss_fn = with_objectives(
        preference_loss(graphdef, PreferenceLoss(beta=BETA)), beta=BETA, has_reference=True
    )
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, metrics), grads = gradient(params, batch)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
    return float(loss), {name: float(value) for name, value in metrics.items()}, norm


def trl_step(policy, reference, prompts, answers, ends, tmp_path):
    """`training_step` of TRL on answers that are given: loss, what it logs, and gradient norm."""
    (model, *_), (frozen, *_) = policy, reference
    records = [dict(record) for record in prompts["record"]]
    trainer = OnlineDPOTrainer(
        model=model,
        ref_model=frozen,
        reward_funcs=vowels,
        args=OnlineDPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=ROWS,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_new_tokens=NEW,
            missing_eos_penalty=PENALTY,
            beta=BETA,
            report_to=[],
        ),
        processing_class=make_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": one["prompt"]} for one in records]),
    )
    tokens, mask = answers

    def generate(model, prompts_of_batch, images=None):
        twice = [np.concatenate([prompts[name]] * 2) for name in ("prompt_tokens", "prompt_mask")]
        arrays = (*twice, tokens, mask)
        return *(torch.tensor(one.astype(np.int64)) for one in arrays), None

    trainer._generate = generate
    trainer.eos_token_ids = list(ends)
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, {"prompt": [one["prompt"] for one in records]})
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None])
    stats = {name: value[-1] for name, value in trainer.stats.items() if value}
    return float(loss), stats, float(norm.norm())


@pytest.mark.parametrize(
    ("ends", "share"),
    [
        pytest.param((264,), False, id="full length", marks=pytest.mark.slow),
        pytest.param((EOS, *OFTEN), True, id="ended"),
    ],
)
def test_a_step_is_that_of_trl(ends, share, policy, reference, prompts, tmp_path):
    _, graphdef, params = policy
    sampled = on_policy(graphdef, ends=ends, penalty=PENALTY)
    drawn = sampled.sample(params, {**prompts, "number": np.arange(ROWS, dtype=np.int32)}, 0)
    pairs = sampled.pairs(params, prompts, 0, share=share)
    assert drawn.mask.all() != share
    columns = sampled.columns(
        sampled.replicated(reference_logps_fn(graphdef)),
        reference[2],
        pairs,
        ("reference_chosen_logps", "reference_rejected_logps"),
    )
    loss, metrics, norm = step_of(policy, {**pairs, **columns})
    answers = (drawn.tokens, drawn.mask)
    theirs, stats, their_norm = trl_step(policy, reference, prompts, answers, ends, tmp_path)
    assert loss == pytest.approx(theirs, rel=1e-5)
    assert norm == pytest.approx(their_norm, rel=1e-4)
    shared = set(stats) & set(metrics)
    assert len(shared) == 14
    if share:
        # TRL adds up these over the padding behind an answer too.
        shared -= {
            f"objective/{one}" for one in ("kl", "entropy", "non_score_reward", "rlhf_reward")
        }
    for name in sorted(shared):
        assert metrics[name] == pytest.approx(stats[name], rel=1e-4, abs=1e-5), name
