"""What `online-dpo` and `grpo` share of a run: the sampler, the rewards, and what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from train.commands.generate import end_tokens
from train.config import DType, GRPOConfig, OnlineDPOConfig
from train.data import normalise_prompt
from train.generation.filters import Filters
from train.generation.sampler import Sampler
from train.inputs.model import blamed_on, hash_model, load_tokenizer
from train.models.reward import check_reward_model
from train.on_policy.reward import (
    Reward,
    function_reward,
    import_function,
    model_reward,
    try_reward,
)
from train.on_policy.rollouts import OnPolicy
from train.runs.run import Run

Config = OnlineDPOConfig | GRPOConfig


def check_rewards(functions: Sequence[str], models: Sequence[str]) -> None:
    """Imports reward functions, and checks directories of reward models without reading weights.

    Raises:
        UserError: one of them cannot be used.
    """
    for name in functions:
        import_function(name)
    for path in models:
        with blamed_on("reward.model"):
            check_reward_model(path)


def make_rewards(
    config: Config, this: Run, functions: Sequence[str], models: Sequence[str], dtype: DType
) -> list[Reward]:
    """Rewards, tried on the first training prompts.

    Args:
        config: The settings.
        this: The run, whose records the functions are told about.
        functions: Each as ``module:function``. With several rewards they may give None.
        models: Directories or hub names.
        dtype: Of the models.

    Raises:
        UserError: one of them cannot be used.
    """
    sets = [this.data, *([] if this.held_out is None else [this.held_out])]
    records = [record for one in sets for record in one.arrays["record"]]
    optional = len(functions) + len(models) > 1
    rewards = [function_reward(name, records, optional=optional) for name in functions]
    if models:
        this.console.print("Loading the reward model ...")
    settings: dict[str, Any] = {"dtype": dtype, "template": config.data.template}
    rewards += [model_reward(path, **settings, mesh=this.mesh) for path in models]
    prompts = [normalise_prompt(record) for record in records]
    return [try_reward(reward, prompts, records) for reward in rewards]


def make_on_policy(
    config: Config, this: Run, reward: Reward, missing_eos_penalty: float | None = None
) -> OnPolicy:
    """What samples the policy's answers and scores them."""
    tokenizer: Any = load_tokenizer(config.model.path, "model.path")
    sampling, pad_id = config.sampling, tokenizer.pad_token_id
    sampler = Sampler(
        this.graphdef,
        sampling.max_new_tokens,
        end_tokens(config.model.path, tokenizer),
        tokenizer.eos_token_id if pad_id is None else pad_id,
        Filters(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p),
    )
    return OnPolicy(
        sampler,
        tokenizer,
        reward,
        missing_eos_penalty=missing_eos_penalty,
        seed=config.trainer.seed,
        mesh=this.mesh,
        console=this.console,
    )


def input_hashes(this: Run, models: Sequence[str]) -> dict[str, str]:
    """Content hashes of what scores depend on besides the tokens of the prompts."""
    digest = hashlib.sha256()
    for record in this.data.arrays["record"]:
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    names = ["reward model"] if len(models) == 1 else [f"reward model {path}" for path in models]
    hashes = {name: hash_model(path) for name, path in zip(names, models, strict=True)}
    return {"records": digest.hexdigest(), **hashes}
