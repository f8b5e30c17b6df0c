"""Rewards: a model against transformers and TRL, functions against what they promise."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest
import torch
from trl.data_utils import apply_chat_template

from tests.train.builders import REWARD_FAMILIES, UNUSED_TOKEN, save_reward_model
from tests.train.tiny_runs import make_tokenizer
from train.config import UserError
from train.models.reward import check_reward_model, last_token_scores, load_reward_model
from train.on_policy.reward import Answers, function_reward, model_reward, try_reward


def scores_of_transformers(model, tokens, mask):
    filled = np.where(mask, tokens, UNUSED_TOKEN)
    with torch.no_grad():
        out = model(torch.tensor(filled), attention_mask=torch.tensor(mask, dtype=torch.long))
    return out.logits[:, 0].numpy()


@pytest.mark.parametrize("family", REWARD_FAMILIES)
def test_scores_are_those_of_transformers(family, tmp_path):
    theirs = save_reward_model(tmp_path, family)
    ours = load_reward_model(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 200, (3, 12), dtype=np.int32)
    mask = np.arange(12) < np.array([[12], [5], [1]])
    expected = scores_of_transformers(theirs, tokens, mask)
    found = jax.jit(lambda *w: last_token_scores(ours._replace(params=w[0]), *w[1:]))(
        ours.params, tokens, mask
    )
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conversation", [False, True])
def test_text_reaches_the_model_as_in_trl(conversation, tmp_path):
    theirs = save_reward_model(tmp_path)
    tokenizer = make_tokenizer()
    texts = ["1+1?", "Say something."]
    prompts = [[{"role": "user", "content": text}] if conversation else text for text in texts]
    answers = Answers(prompts, ["2", "something longer"], [[1], [1]], [{}, {}])
    found = model_reward(str(tmp_path), dtype="float32", template="auto", mesh=None)(answers)
    expected = []
    for prompt, answer in zip(prompts, answers.messages(), strict=True):
        whole = (
            apply_chat_template({"messages": [*prompt, *answer]}, tokenizer)["text"]
            if conversation
            else prompt + answer
        )
        ids = np.array([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        expected += scores_of_transformers(theirs, ids, np.ones_like(ids, bool)).tolist()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_other_models_are_refused(tmp_path):
    save_reward_model(tmp_path / "two", labels=2)
    with pytest.raises(ValueError, match=r"score.weight is \[2, 48\], expected \[1, 48\]"):
        check_reward_model(tmp_path / "two")
    file = tmp_path / "two" / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(ValueError, match="a reward model is a …ForSequenceClassification"):
        check_reward_model(tmp_path / "two")
    file.write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]})
    )
    with pytest.raises(ValueError, match="model_type is 'gpt2'; supported are llama"):
        check_reward_model(tmp_path / "two")


MODULE = """
calls = []

def everything(prompts, completions, **kwargs):
    calls.append((prompts, completions, kwargs))
    return [len(text) for text in completions]

def named(completions, answer, completion_ids):
    return [float(text == right) for text, right in zip(completions, answer)]

def needs_more(completions, solution):
    return [0.0] * len(completions)

def too_few(completions, **kwargs):
    return [0.0]

def not_a_number(completions, **kwargs):
    return [0.0] * (len(completions) - 1) + [float("nan")]

def none(completions, **kwargs):
    return [None for _ in completions]

def one_number(completions, **kwargs):
    return 1.0

def breaks(completions, **kwargs):
    raise KeyError("gold")

constant = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "tiny_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("tiny_rewards", None)


RECORDS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4", "hint": "even"}]


def answers(records=RECORDS, completions=("2", "5")):
    prompts = [record["prompt"] for record in records]
    return Answers(prompts, list(completions), [[1], [2]], records)


def test_function_gets_what_trl_gives(module):
    reward = function_reward("tiny_rewards:everything", RECORDS)
    found = reward(answers(completions=("2", "five")))
    assert (found.tolist(), found.dtype) == ([1.0, 4.0], np.float64)
    prompts, completions, fields = sys.modules["tiny_rewards"].calls[-1]
    assert (prompts, completions) == (["1+1=", "2+2="], ["2", "five"])
    assert fields == {
        "answer": ["2", "4"],
        "hint": [None, "even"],
        "completion_ids": [[1], [2]],
    }


def test_completions_of_conversations_are_messages(module):
    records = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "b")]
    function_reward("tiny_rewards:everything", records)(answers(records))
    prompts, completions, _ = sys.modules["tiny_rewards"].calls[-1]
    assert prompts[0] == [{"role": "user", "content": "a"}]
    assert completions[1] == [{"role": "assistant", "content": "5"}]


def test_function_gets_the_arguments_that_it_names(module):
    reward = function_reward("tiny_rewards:named", RECORDS)
    assert reward(answers()).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_rewards", "must be written module:function, got 'tiny_rewards'"),
        ("no_such_module:f", "module 'no_such_module' cannot be imported"),
        ("broken_rewards:f", "ModuleNotFoundError: No module named 'a_package_that_nobody_has'"),
        ("tiny_rewards:nothing", "has no function 'nothing'"),
        ("tiny_rewards:constant", "has no function 'constant'"),
        ("tiny_rewards:needs_more", "takes solution, which the records do not have; there are"),
        ("tiny_rewards:too_few", "must return 2 numbers, one for each answer, got shape [1]"),
        ("tiny_rewards:not_a_number", "must return finite numbers, got nan for answer 1 of 2"),
        ("tiny_rewards:none", "must return finite numbers, got nan"),
        ("tiny_rewards:one_number", "must return a number for each answer, got 1.0"),
        ("tiny_rewards:breaks", "raised KeyError: 'gold'"),
    ],
)
def test_functions_that_cannot_be_used(name, message, module):
    with pytest.raises(UserError) as error:
        try_reward(function_reward(name, RECORDS), [one["prompt"] for one in RECORDS], RECORDS)
    assert "reward.function" in str(error.value)
    assert message in str(error.value)
