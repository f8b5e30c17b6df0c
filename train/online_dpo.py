r"""``python -m train online-dpo``: alignment on pairs of the policy's own answers, ranked by a reward.

In every step the policy answers each prompt of a batch twice (`train.sampling`), a reward scores the
answers, and the train step of `dpo` learns from the better and the worse one, with any loss on pairs
and any optimizer, online merging included (Guo et al., 2024, "Direct Language Model Alignment from
Online AI Feedback", arXiv:2402.04792). Prompts come from any data set that `dpo`, `kto` or `sft`
read, or from records that have nothing else.

    python -m train online-dpo --config train/configs/online_dpo.yaml \
        --model.path runs/sft/export --model.base models/smollm2 --data.path prompts.jsonl \
        --reward.function my_rewards:brevity --output_dir runs/online

with `my_rewards.py` in the current directory (a function written for TRL works as it is):

    def brevity(prompts, completions, **kwargs):
        return [-float(len(text)) for text in completions]

Prompts that are messages give completions that are messages, `[{"role": "assistant", "content": …}]`.
Other fields of the records come as keyword arguments. `--reward.model DIR` takes a reward model
instead: a `…ForSequenceClassification` directory with one label, as TRL's `RewardTrainer` writes.

The log has TRL's names: `objective/scores`, `objective/scores_margin`, `objective/kl`,
`objective/rlhf_reward`, `val/contain_eos_token`, `rewards/margins`, … Held-out prompts are answered
once at each evaluation, from the same draws, for `eval_objective/scores`, which `trainer.early_stop`
and `trainer.export_best` can go by.

Against TRL: the reference stays the model at `model.path`, held in memory next to the policy; `ipo`
averages over tokens as in `dpo`; a reward that is not a finite number ends the run instead of being
counted as nothing.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Any

import numpy as np

from train.alignment import Objective, align, check_merge
from train.config import OnlineDPOConfig, check
from train.data import normalise_prompt, tokenize_prompts
from train.data.buckets import LEAST_SHARED
from train.dpo import check_loss, settings_of
from train.filters import Filters
from train.generate import end_tokens
from train.losses import beta_schedule, pair_loss
from train.models.reward import check_reward_model
from train.objectives import check_starts_at_reference, preference_loss, reference_logps_fn
from train.on_policy import ANSWERS, OnPolicy, with_objectives
from train.prepare import blamed_on, hash_model, load_tokenizer
from train.reward import Reward, function_reward, model_reward, tried
from train.run import Run, set_up
from train.sampling import Sampler
from train.sharding import Params
from train.step import Batch


def run(config: OnlineDPOConfig) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises:
        UserError: something given cannot be used, before training starts; or the reward gives
            something other than finite numbers.
    """
    check(config)
    check_merge(config)
    check_loss(config.loss, config.trainer.gradient_accumulation_steps)
    if config.reward.model is not None:
        with blamed_on("reward.model"):
            check_reward_model(config.reward.model)
    this = set_up("online-dpo", config, tokenize_prompts)
    if this is not None:
        align(config, this, _objective(config, this))


def _reward(config: OnlineDPOConfig, this: Run) -> Reward:
    """The reward, tried on the first training prompts."""
    options = config.reward
    sets = [this.data, *([] if this.held_out is None else [this.held_out])]
    records = [record for one in sets for record in one.arrays["record"]]
    if options.function is not None:
        reward = function_reward(options.function, records)
    else:
        assert options.model is not None
        this.console.print("Loading the reward model ...")
        settings: dict[str, Any] = {"dtype": options.dtype, "template": config.data.template}
        reward = model_reward(options.model, **settings, mesh=this.mesh)
    return tried(reward, [normalise_prompt(record) for record in records], records)


def _on_policy(config: OnlineDPOConfig, this: Run) -> OnPolicy:
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
        _reward(config, this),
        missing_eos_penalty=config.reward.missing_eos_penalty,
        seed=config.trainer.seed,
        mesh=this.mesh,
        console=this.console,
    )


def _objective(config: OnlineDPOConfig, this: Run) -> Objective:
    loss, settings = config.loss, settings_of(config.loss)
    has_reference = pair_loss(**settings).needs_reference
    policy, share = _on_policy(config, this), _shares_prompts(config, this)
    score = policy.replicated(
        reference_logps_fn(this.graphdef, vocab_chunk=loss.vocab_chunk, ld_alpha=loss.ld_alpha)
    )

    def sample(
        params: Params, reference: Params | None, batch: Batch, done: int
    ) -> dict[str, np.ndarray]:
        pairs = policy.pairs(params, batch, done, share=share)
        return pairs | (
            {} if reference is None else policy.reference_columns(score, reference, pairs)
        )

    return Objective(
        loss_fn=with_objectives(
            preference_loss(
                this.graphdef,
                beta_at=beta_schedule(loss.beta_schedule, loss.beta, loss.beta_final, this.steps),
                vocab_chunk=loss.vocab_chunk,
                **settings,
            ),
            beta=loss.beta,
            has_reference=has_reference,
        ),
        evaluate=partial(policy.evaluate, batch_size=this.eval_batch_size),
        score=score,
        names=("chosen", "rejected") if has_reference else (),
        depends_on=(),
        check_first=partial(check_starts_at_reference, **settings),
        sample=sample,
        inputs=_inputs(config, this),
    )


def _shares_prompts(config: OnlineDPOConfig, this: Run) -> bool:
    """Whether a prompt is computed once for both answers; see `train.data.saves_by_sharing`."""
    wanted = config.data.prefix_sharing
    if wanted != "auto":
        return wanted
    prompts = int(this.data.arrays["prompt_mask"].sum())
    answers = ANSWERS * config.sampling.max_new_tokens * len(this.data)
    return prompts >= LEAST_SHARED * (ANSWERS * prompts + answers)


def _inputs(config: OnlineDPOConfig, this: Run) -> dict[str, str]:
    """Content hashes of what scores depend on besides the tokens of the prompts."""
    digest = hashlib.sha256()
    for record in this.data.arrays["record"]:
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    hashes = {"records": digest.hexdigest()}
    if config.reward.model is not None:
        hashes["reward model"] = hash_model(config.reward.model)
    return hashes
