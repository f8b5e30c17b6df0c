r"""``python -m train grpo``: alignment on groups of the policy's own answers, scored by rewards.

In every step the policy answers each prompt of a batch `sampling.num_generations` times
(`train.generation.sampler`), rewards score the answers, and the train step of `dpo` raises the
probability of those that are better than the others to the same prompt, with any optimizer, online
merging included (GRPO: Shao et al., 2024, "DeepSeekMath", arXiv:2402.03300). Prompts come from any
data set that `dpo`, `kto` or `sft` read, or from records that have nothing else.

    python -m train grpo --config train/configs/grpo.yaml --config train/configs/smollm2_on_dare.yaml \
        --model.path runs/sft/export --model.base models/smollm2 --data.path questions.jsonl \
        --reward.function my_rewards:correct --output_dir runs/grpo

with `my_rewards.py` in the current directory (a function written for TRL works as it is), where the
records of `questions.jsonl` hold a `prompt` and an `answer`:

    def correct(completions, answer, **kwargs):
        return [float(text.strip().endswith(right)) for text, right in zip(completions, answer)]

Prompts that are messages give completions that are messages. Several functions
(`--reward.function '[my_rewards:correct, my_rewards:brevity]'`) and reward models add up with
`reward.weights`; see `train.commands.online_dpo` for both.

The log has TRL's names: `reward`, `reward_std`, `rewards/NAME/mean` and `/std`,
`frac_reward_zero_std`, `kl`, `entropy`, `clip_ratio/low_mean` …, `completions/mean_length`,
`completions/clipped_ratio` and the others on lengths. Held-out prompts are answered once at each
evaluation, from the same draws, for `eval_reward` and `eval_rewards/NAME/mean`, which
`trainer.early_stop` and `trainer.export_best` can go by.

Settings have TRL's names and defaults, in groups: `loss.type` is its loss_type, `loss.beta`,
`loss.epsilon` … as there, `sampling.num_generations`, `sampling.num_iterations`,
`sampling.max_new_tokens` (max_completion_length), `reward.weights` (reward_weights),
`reward.scale_rewards` and `reward.multi_objective_aggregation`. What differs from TRL:

- `trainer.batch_size` counts prompts, as in `online-dpo`: a step learns from it times
  `sampling.num_generations` answers. It has to be a multiple of the devices, and the answers one of
  the devices times `trainer.gradient_accumulation_steps`. New answers are sampled at every
  `sampling.num_iterations`-th step (TRL's steps_per_generation is that of one optimizer step).
- Draws depend on the seed, the step and the place in the batch alone. A run is saved only where it
  samples anew, so that one that goes on is the same bit for bit: with `sampling.num_iterations` above
  1, `trainer.steps`, `save_every` and `eval_every` are multiples of it, and a signal to stop waits
  for the last step on the answers at hand.
- The reference stays the model at `model.path`, in memory next to the policy while `loss.beta` is
  above 0.
- A reward that is not a finite number ends the run. Of several functions one may return None for an
  answer to which it does not apply; an answer without any reward has an advantage of 0, and a warning.
- `cispo` without `loss.epsilon_high` and `luspo` without one ratio an answer are refused.
- With gradient accumulation `bnpo` divides by the tokens of each part and all others are what they
  are without; metrics are means over all tokens, not over parts.
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
