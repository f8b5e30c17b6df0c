"""Settings of on-policy training: how answers are sampled and what ranks them."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.base import DType, UserError, require


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the policy answers a prompt; names and defaults are TRL's.

    Attributes:
        max_new_tokens: Longest answer, in tokens, the end mark included.
        temperature: Divides the logits; above 0, because the two answers to a prompt must differ.
        top_k: Sample from the most probable tokens only, so many. Unset: all.
        top_p: Sample from the smallest set of tokens that holds this much probability.
        min_p: Sample from tokens at least so probable, relative to the most probable one.
    """

    max_new_tokens: int = 64
    temperature: float = 0.9
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """What scores an answer. Give function or model.

    Attributes:
        function: A Python callable as module:function, importable from the directory where the
            command is started. Its signature is that of TRL's reward functions: `reward(prompts,
            completions, **kwargs)` returns a number for each. Prompts and completions are strings,
            or lists of messages where the record's prompt is one; the record's other fields and
            `completion_ids` come as lists by name, as far as the function takes them.
        model: Directory of a reward model, or a hub name: a Llama, Qwen2 or Qwen3 model for sequence
            classification with one label.
        dtype: Type of the reward model's computations and weights.
        missing_eos_penalty: What is taken off the score of an answer that has not ended after
            sampling.max_new_tokens. Unset: nothing.
    """

    function: str | None = None
    model: str | None = None
    dtype: DType = "float32"
    missing_eos_penalty: float | None = None


def check_on_policy(sampling: SamplingOptions, reward: RewardOptions) -> None:
    """Checks the ranges of both groups. Raises `UserError`."""
    new, temperature = sampling.max_new_tokens, sampling.temperature
    require(new > 0, "sampling.max_new_tokens", new, "positive")
    require(
        0 < temperature < float("inf"),
        "sampling.temperature",
        temperature,
        "above 0 (greedy answers to one prompt are the same)",
    )
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    require(top_k is None or top_k > 1, "sampling.top_k", top_k, "at least 2")
    require(0 < top_p <= 1, "sampling.top_p", top_p, "in (0, 1]")
    require(0 <= min_p < 1, "sampling.min_p", min_p, "in [0, 1)")
    if (reward.function is None) == (reward.model is None):
        raise UserError("Give exactly one of reward.function and reward.model.")
    penalty = reward.missing_eos_penalty
    require(
        penalty is None or 0 < penalty < float("inf"),
        "reward.missing_eos_penalty",
        penalty,
        "positive",
    )
