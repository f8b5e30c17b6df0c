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

from dataclasses import fields
from functools import partial

from train.config import GRPOConfig, check_settings
from train.data import tokenize_prompts
from train.inputs.model import blamed_on
from train.losses import GroupLoss
from train.objectives.group import group_loss, sampled_logps_fn
from train.objectives.preference import check_unpaired_start
from train.on_policy.groups import Groups
from train.on_policy.reward import several
from train.on_policy.setup import check_rewards, input_hashes, make_on_policy, make_rewards
from train.runs.alignment import Objective, align, check_merge
from train.runs.run import Run, set_up


def run(config: GRPOConfig) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises:
        UserError: something given cannot be used, before training starts; or a reward gives
            something other than finite numbers.
    """
    check_settings(config)
    check_merge(config)
    with blamed_on("loss"):
        loss_of = _loss_of(config)
    check_rewards(config.reward.functions, config.reward.models)
    this = set_up("grpo", config, tokenize_prompts)
    if this is not None:
        align(config, this, _objective(config, this, loss_of))


def _loss_of(config: GRPOConfig) -> GroupLoss:
    named = {one.name for one in fields(GroupLoss)} & {one.name for one in fields(config.loss)}
    settings = {name: getattr(config.loss, name) for name in named}
    return GroupLoss(**settings, max_completion_length=config.sampling.max_new_tokens)


def _objective(config: GRPOConfig, this: Run, loss_of: GroupLoss) -> Objective:
    groups = _groups(config, this)
    has_reference = loss_of.beta > 0
    return Objective(
        loss_fn=group_loss(
            this.graphdef,
            loss_of,
            temperature=config.sampling.temperature,
            vocab_chunk=config.loss.vocab_chunk,
        ),
        evaluate=partial(
            groups.policy.evaluate, batch_size=this.eval_batch_size, figures=groups.figures
        ),
        score=groups.score,
        names=("completion",) if has_reference else (),
        depends_on=(),
        check_first=partial(check_unpaired_start, beta=loss_of.beta)
        if has_reference
        else lambda _: None,
        sample=groups.batch,
        inputs=input_hashes(this, config.reward.models),
    )


def _groups(config: GRPOConfig, this: Run) -> Groups:
    options, sampling = config.reward, config.sampling
    rewards = make_rewards(config, this, options.functions, options.models, options.dtype)
    policy = make_on_policy(config, this, several(rewards))
    whole = options.multi_objective_aggregation == "sum_then_normalize"
    score = sampled_logps_fn(
        this.graphdef,
        temperature=sampling.temperature,
        vocab_chunk=config.loss.vocab_chunk,
        parts=config.trainer.gradient_accumulation_steps,
    )
    return Groups(
        policy,
        sampling.num_generations,
        options.names,
        [1.0] * len(rewards) if options.weights is None else options.weights,
        options.scale_rewards if whole else "each",
        policy.replicated(score),
        keeps_old=sampling.num_iterations > 1,
        masks_truncated=config.loss.mask_truncated_completions,
    )
