"""Builds what `online-dpo` and `grpo` share: the sampler, the rewards, and their content hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from train.config import GRPOConfig, OnlineDPOConfig
from train.data import normalise_prompt
from train.generation.filters import Filters
from train.generation.sampler import Sampler
from train.inputs.model import blamed_on, hash_model
from train.models.model_dir import end_tokens
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


def check_rewards(config: Config) -> None:
    """Imports reward functions, and checks directories of reward models without reading weights.

    Raises `UserError` where one of them cannot be used.
    """
    functions, models = _functions_and_models(config)
    for name in functions:
        import_function(name)
    for path in models:
        with blamed_on("reward.model"):
            check_reward_model(path)


def _functions_and_models(config: Config) -> tuple[Sequence[str], Sequence[str]]:
    """The reward functions, each as ``module:function``, and the directories or hub names of models."""
    if isinstance(config, GRPOConfig):
        return config.reward.functions, config.reward.models
    function, model = config.reward.function, config.reward.model
    return [] if function is None else [function], [] if model is None else [model]


def make_rewards(config: Config, run: Run) -> list[Reward]:
    """Rewards, tried on the first training prompts. With several, functions may give None.

    Raises `UserError` where one of them cannot be used.
    """
    functions, models = _functions_and_models(config)
    sets = [run.data, *([] if run.held_out is None else [run.held_out])]
    records = [record for one in sets for record in one.arrays["record"]]
    optional = len(functions) + len(models) > 1
    rewards = [function_reward(name, records, optional=optional) for name in functions]
    if models:
        run.console.print("Loading the reward model ...")
    dtype, template = config.reward.dtype, config.data.template
    rewards += [
        model_reward(path, dtype=dtype, template=template, mesh=run.mesh) for path in models
    ]
    prompts = [normalise_prompt(record) for record in records]
    return [try_reward(reward, prompts, records) for reward in rewards]


def make_on_policy(
    config: Config, run: Run, reward: Reward, missing_eos_penalty: float | None = None
) -> OnPolicy:
    """Makes the `OnPolicy` of a run."""
    sampling, tokenizer = config.sampling, run.tokenizer
    pad_id = tokenizer.pad_token_id
    sampler = Sampler(
        run.graphdef,
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
        mesh=run.mesh,
        console=run.console,
    )


def hash_rewards(config: Config, run: Run) -> dict[str, str]:
    """Content hashes of what scores depend on besides the tokens of the prompts."""
    digest, models = hashlib.sha256(), _functions_and_models(config)[1]
    for record in run.data.arrays["record"]:
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    names = ["reward model"] if len(models) == 1 else [f"reward model {path}" for path in models]
    hashes = {name: hash_model(path) for name, path in zip(names, models, strict=True)}
    return {"records": digest.hexdigest(), **hashes}
