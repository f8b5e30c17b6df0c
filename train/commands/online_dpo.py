"""``python -m train online-dpo``: alignment on pairs of the policy's own answers, ranked by a reward.

The page ``docs/on_policy.md`` describes its rewards, its log, and how it differs from TRL.
"""

from __future__ import annotations

from functools import partial

from train.config import OnlineDPOConfig
from train.data import tokenize_prompts
from train.data.buckets import LEAST_SHARED
from train.losses import PreferenceLoss, check_starts_at_reference
from train.losses.options import beta_from, check_preference_loss
from train.objectives.preference import preference_loss, reference_logps_fn
from train.on_policy.rollouts import ANSWERS, pair_figures, with_objectives
from train.on_policy.setup import check_rewards, hash_rewards, make_on_policy, make_rewards
from train.runs.run import Run
from train.runs.set_up import check_config, set_up
from train.runs.train import Objective, train
from train.types import Batch, Params, Prepared


def train_online_dpo(config: OnlineDPOConfig) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises `UserError` before training starts where something given cannot be used, and during training
    where the reward gives something other than finite numbers.
    """
    check_config(config)
    loss = check_preference_loss(config.loss, config.trainer.gradient_accumulation_steps)
    check_rewards(config)
    run = set_up("online-dpo", config, tokenize_prompts)
    if run is not None:
        train(run, _objective(config, run, loss))


def _objective(config: OnlineDPOConfig, run: Run, loss: PreferenceLoss) -> Objective:
    has_reference, chunk = loss.needs_reference, config.loss.vocab_chunk
    (reward,) = make_rewards(config, run)
    policy = make_on_policy(config, run, reward, config.reward.missing_eos_penalty)
    share = _shares_prompts(config, run)
    score = policy.replicated(
        reference_logps_fn(run.graphdef, vocab_chunk=chunk, ld_alpha=loss.ld_alpha)
    )

    def sample(params: Params, reference: Params | None, batch: Batch, done: int) -> Prepared:
        pairs = policy.pairs(params, batch, done, share=share)
        if reference is not None:
            names = [f"reference_{name}_logps" for name in ("chosen", "rejected")]
            pairs |= policy.columns(score, reference, pairs, names)
        return pairs, {}

    loss_fn = preference_loss(
        run.graphdef, loss, beta_at=beta_from(config.loss, run.steps), vocab_chunk=chunk
    )
    return Objective(
        loss_fn=with_objectives(loss_fn, beta=loss.beta, has_reference=has_reference),
        evaluate=partial(policy.evaluate, batch_size=run.eval_batch_size, figures=pair_figures),
        score=score,
        names=("chosen", "rejected") if has_reference else (),
        check_first=partial(check_starts_at_reference, loss=loss),
        sample=sample,
        inputs=hash_rewards(config, run),
    )


def _shares_prompts(config: OnlineDPOConfig, run: Run) -> bool:
    """Whether a prompt is computed once for both answers; see `train.data.saves_by_sharing`."""
    wanted = config.data.prefix_sharing
    if wanted != "auto":
        return wanted
    prompts = int(run.data.arrays["prompt_mask"].sum())
    answers = ANSWERS * config.sampling.max_new_tokens * len(run.data)
    return prompts >= LEAST_SHARED * (ANSWERS * prompts + answers)
