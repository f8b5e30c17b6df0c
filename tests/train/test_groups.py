"""Batches of groups and a whole step against TRL's GRPOTrainer, on the same sampled answers."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tests.train.tiny_models import SMALL, VOCAB
from tests.train.tiny_runs import make_tokenizer
from train.losses import GroupLoss
from train.models import from_hf, split_model
from train.objectives.accumulate import loss_and_gradient
from train.objectives.group import group_loss, sampled_logps_fn
from train.on_policy.advantages import advantages, weighted_rewards
from train.on_policy.groups import GroupBatches
from train.on_policy.rollouts import Sampled

PROMPTS, ANSWERS, NEW, EOS = 3, 4, 9, 1
WEIGHTS = [1.0, -0.5]
TEMPERATURE = 0.8


def length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def parity(completion_ids, **kwargs):
    """Does not apply to answers that begin with an odd token; 1 for all answers to the last prompt."""
    scores = [float(sum(ids) % 5) for ids in completion_ids]
    scores[-ANSWERS:] = [1.0] * ANSWERS
    odd = [ids[0] % 2 for ids in completion_ids]
    return [None if skip else score for skip, score in zip(odd, scores, strict=True)]


class Answers(NamedTuple):
    prompts: list[list[int]]
    tokens: np.ndarray
    mask: np.ndarray
    ended: np.ndarray

    @property
    def ids(self):
        return [row[used].tolist() for row, used in zip(self.tokens, self.mask, strict=True)]


@pytest.fixture(scope="module")
def answers():
    """Those to prompt i at ANSWERS * i and after, as in TRL; about half of them end."""
    rng = np.random.default_rng(0)
    rows = PROMPTS * ANSWERS
    prompts = [rng.integers(3, VOCAB, size).tolist() for size in (5, 2, 4)]
    lengths = rng.integers(2, NEW + 1, rows)
    lengths[::3] = NEW
    mask = np.arange(NEW) < lengths[:, None]
    tokens = np.where(mask, rng.integers(3, VOCAB, mask.shape), EOS).astype(np.int32)
    ended = lengths < NEW
    tokens[np.flatnonzero(ended), lengths[ended] - 1] = EOS
    return Answers(prompts, tokens, mask, ended)


class Policy:
    """Gives the answers, as `train.on_policy.rollouts.OnPolicy` would."""

    mesh = None

    def __init__(self, answers, names=("length", "parity")):
        functions = {"length": length, "parity": parity}
        columns = [functions[name](answers.ids) for name in names]
        # All first answers, all second ones, …
        order = np.arange(PROMPTS * ANSWERS).reshape(PROMPTS, ANSWERS).T.reshape(-1)
        scores = np.array(columns, np.float64).T[order]
        arrays = (one[order] for one in (answers.tokens, answers.mask, answers.ended))
        self.found = Sampled(*arrays, scores, [""] * len(order))

    def sample(self, params, batch, step, *, copies):
        assert copies == ANSWERS
        return self.found

    def of_all_processes(self, rows):
        return rows.astype(np.float32)

    def columns(self, score, params, batch, names):
        return dict(zip(names, map(np.asarray, score(params, batch)), strict=True))


def prompt_batch(answers):
    width = 6
    tokens, mask = np.zeros((2, PROMPTS, width), np.int32)
    for row, ids in enumerate(answers.prompts):
        tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, 1
    return {"prompt_tokens": tokens, "prompt_mask": mask > 0, "index": np.arange(PROMPTS)}


def groups(answers, scale="group", score=None, **settings):
    names = ("length", "parity")
    return GroupBatches(Policy(answers), ANSWERS, names, WEIGHTS, scale, score, **settings)  # type: ignore


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A torch model, our structure, and its parameters."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    small = {**SMALL, "num_hidden_layers": 1, "initializer_range": 0.2}
    made = Qwen2ForCausalLM(Qwen2Config(**small))
    made.save_pretrained(directory)
    return made, *split_model(from_hf(directory))


@pytest.fixture(scope="module")
def trainer(model, answers, tmp_path_factory):
    """TRL's trainer, which is handed the answers in place of sampling some."""
    records = [{"prompt": "a" * (1 + row)} for row in range(PROMPTS) for _ in range(ANSWERS)]
    made = GRPOTrainer(
        model=model[0],
        reward_funcs=[length, parity],
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=PROMPTS * ANSWERS,
            num_generations=ANSWERS,
            max_completion_length=NEW,
            temperature=TEMPERATURE,
            reward_weights=WEIGHTS,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        ),
        processing_class=make_tokenizer(),
        train_dataset=Dataset.from_list(records),
    )
    made._tokenize_prompts = lambda prompts: (  # type: ignore
        [answers.prompts[row // ANSWERS] for row in range(len(prompts))],
        None,
        {},
    )
    made._generate_single_turn = lambda *_: (answers.ids, None)  # type: ignore
    made.eos_token_ids = [EOS]
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    made.records = records  # type: ignore
    return made


def of_trl(trainer):
    """The inputs that TRL makes, and what it logs."""
    trainer._metrics["train"].clear()
    made = trainer._generate_and_score_completions([dict(one) for one in trainer.records])
    return made, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("masks_truncated", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none", "each"])
def test_advantages_and_metrics_are_trls(scale, masks_truncated, answers, trainer):
    trainer.scale_rewards, trainer.mask_truncated_completions = scale, masks_truncated
    aggregation = {"each": "normalize_then_sum"}.get(scale, "sum_then_normalize")
    trainer.multi_objective_aggregation = aggregation
    theirs, their_metrics = of_trl(trainer)
    made = groups(answers, scale, masks_truncated=masks_truncated)
    columns, metrics = made.batch({}, None, prompt_batch(answers), 0)
    gained = theirs["advantages"].numpy()
    np.testing.assert_allclose(columns["advantages"], gained, rtol=1e-5, atol=1e-6)
    assert np.abs(gained).max() > 0.5
    np.testing.assert_array_equal(columns["completion_mask"], theirs["completion_mask"].numpy())
    assert columns["completion_mask"].any(axis=1).all() != masks_truncated
    np.testing.assert_array_equal(
        np.where(answers.mask, columns["completion_tokens"], 0),
        np.where(answers.mask, theirs["completion_ids"].numpy(), 0),
    )
    width = theirs["prompt_ids"].shape[1]
    np.testing.assert_array_equal(columns["prompt_mask"][:, -width:], theirs["prompt_mask"])
    assert set(metrics) == set(their_metrics) - {"num_tokens"}
    for name, value in metrics.items():
        assert value == pytest.approx(their_metrics[name], rel=1e-5), name


def test_an_answer_without_any_reward_has_no_advantage():
    scores = np.array([[[1.0, np.nan], [np.nan, np.nan], [3.0, 2.0]]])
    rewards = weighted_rewards(scores, [1.0, 0.5])
    np.testing.assert_array_equal(rewards, [[1.0, np.nan, 4.0]])
    gained, flat = advantages(rewards, "none")
    np.testing.assert_array_equal(gained, [[-1.5, 0.0, 1.5]])
    assert not flat.any()


def test_short_answers_make_narrow_batches_and_those_without_reward_are_warned_of(answers):
    mask = answers.mask & (np.arange(NEW) < 5)
    made = groups(answers._replace(mask=mask))
    made.policy.found.scores[2] = np.nan
    with pytest.warns(UserWarning, match="every reward function returned None for some answers"):
        columns, metrics = made.batch({}, None, prompt_batch(answers), 0)
    assert columns["completion_tokens"].shape == (PROMPTS * ANSWERS, 8)
    np.testing.assert_array_equal(columns["completion_mask"], mask[:, :8])
    # The first answer to the third prompt; the others are measured against each other.
    without, *others = columns["advantages"][2 * ANSWERS :]
    assert without == 0
    assert np.abs(others).max() > 0.5 > 1e-5 > abs(np.sum(others))
    assert metrics["completions/max_length"] == 5


def noisy(params, seed):
    """Parameters some steps away."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def gradient_of(torch_model, directory):
    """Torch's gradient as a tree of ours: saved as if it were weights, and read."""
    for parameter in torch_model.parameters():
        parameter.data, parameter.grad = parameter.grad.clone(), parameter.data
    torch_model.save_pretrained(directory)
    for parameter in torch_model.parameters():
        parameter.data, parameter.grad = parameter.grad, None
    return split_model(from_hf(directory))[1]


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_step_is_that_of_trl(parts, model, answers, trainer, tmp_path):
    torch_model, graphdef, params = model
    trainer.scale_rewards, trainer.mask_truncated_completions = "group", True
    trainer.multi_objective_aggregation = "sum_then_normalize"
    trainer.beta = 0.0  # its own reference is not the one of this test
    inputs, _ = of_trl(trainer)
    score = jax.jit(sampled_logps_fn(graphdef, temperature=TEMPERATURE, microbatches=parts))
    made = groups(answers, score=score, masks_truncated=True, keeps_old=True)
    old, reference = noisy(params, 1), noisy(params, 2)
    batch, _ = made.batch(old, reference, prompt_batch(answers), 0)
    loss_of = GroupLoss(beta=0.1, epsilon_high=0.28, max_completion_length=NEW)
    loss_fn = group_loss(graphdef, loss_of, temperature=TEMPERATURE)
    gradient = jax.jit(loss_and_gradient(loss_fn, parts))
    (loss, metrics), grads = gradient(params, batch)

    trainer.loss_type, trainer.beta, trainer.epsilon_high = "dapo", 0.1, 0.28
    inputs["old_per_token_logps"] = torch.tensor(batch["old_logps"])
    inputs["ref_per_token_logps"] = torch.tensor(batch["reference_logps"])
    trainer._metrics["train"].clear()
    torch_model.zero_grad()
    theirs = trainer._compute_loss(torch_model, inputs)
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    expected = gradient_of(torch_model, tmp_path)
    for ours, leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(ours - leaf).max()) <= 1e-5 * float(jnp.abs(leaf).max())
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert set(logged) == set(metrics) - {"loss"}
    assert float(metrics["clip_ratio/region_mean"]) > 0
    for name in logged:
        # Extremes over the answers of a part are averaged over the parts, as TRL does.
        if parts == 1 or name not in ("clip_ratio/low_min", "clip_ratio/high_max"):
            assert float(metrics[name]) == pytest.approx(logged[name], rel=1e-5, abs=1e-7), name


def test_bnpo_averages_over_the_tokens_of_each_part(model, answers):
    _, graphdef, params = model
    made = groups(answers)
    batch, _ = made.batch(params, None, prompt_batch(answers), 0)
    loss_fn = group_loss(graphdef, GroupLoss(type="bnpo"))
    loss = float(jax.jit(loss_and_gradient(loss_fn, 2))(params, batch)[0][0])
    gained, counts = batch["advantages"], batch["completion_mask"].sum(axis=1)
    # On policy a token's loss is minus the advantage of its answer.
    parts = [-np.average(gained[part::2], weights=counts[part::2]) for part in range(2)]
    assert loss == pytest.approx(np.mean(parts), rel=1e-4)
    assert loss != pytest.approx(-np.average(gained, weights=counts), rel=1e-2)
