"""``python -m train grpo``: alignment on groups of the policy's own answers, scored by rewards.

The page ``docs/on_policy.md`` describes its settings, its log, and how it differs from TRL.
"""

from __future__ import annotations

from functools import partial

from train.config import GRPOConfig
from train.data import tokenize_prompts
from train.losses import GroupLoss, check_unpaired_start
from train.losses.options import loss_from
from train.objectives.group import group_loss, sampled_logps_fn
from train.on_policy.groups import GroupBatches
from train.on_policy.reward import stack_rewards
from train.on_policy.setup import check_rewards, hash_rewards, make_on_policy, make_rewards
from train.runs.run import Run
from train.runs.set_up import check_config, set_up
from train.runs.train import Objective, train


def train_grpo(config: GRPOConfig) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises `UserError` before training starts where something given cannot be used, and during training
    where a reward gives something other than finite numbers.
    """
    check_config(config)
    length = config.sampling.max_new_tokens
    loss = loss_from(GroupLoss, config.loss, max_completion_length=length)
    check_rewards(config)
    run = set_up("grpo", config, tokenize_prompts)
    if run is not None:
        train(run, _objective(config, run, loss))


def _objective(config: GRPOConfig, run: Run, loss: GroupLoss) -> Objective:
    groups, has_reference = _groups(config, run), loss.beta > 0
    loss_fn = group_loss(
        run.graphdef,
        loss,
        temperature=config.sampling.temperature,
        vocab_chunk=config.loss.vocab_chunk,
    )
    answer = groups.policy.evaluate
    return Objective(
        loss_fn=loss_fn,
        evaluate=partial(answer, batch_size=run.eval_batch_size, figures=groups.figures),
        score=groups.score,
        names=("completion",) if has_reference else (),
        check_first=partial(check_unpaired_start, beta=loss.beta) if has_reference else None,
        sample=groups.batch,
        inputs=hash_rewards(config, run),
    )


def _groups(config: GRPOConfig, run: Run) -> GroupBatches:
    options, sampling = config.reward, config.sampling
    rewards = make_rewards(config, run)
    policy = make_on_policy(config, run, stack_rewards(rewards))
    whole = options.multi_objective_aggregation == "sum_then_normalize"
    score = sampled_logps_fn(
        run.graphdef,
        temperature=sampling.temperature,
        vocab_chunk=config.loss.vocab_chunk,
        microbatches=config.trainer.gradient_accumulation_steps,
    )
    return GroupBatches(
        policy,
        sampling.num_generations,
        options.names,
        [1.0] * len(rewards) if options.weights is None else options.weights,
        options.scale_rewards if whole else "each",
        policy.replicated(score),
        keeps_old=sampling.num_iterations > 1,
        masks_truncated=config.loss.mask_truncated_completions,
    )
