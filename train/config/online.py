"""Settings of on-policy training: how answers are sampled and what ranks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import ranges
from train.config.base import DType, UserError


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the policy answers a prompt; names and defaults are TRL's.

    Attributes:
        max_new_tokens: Longest answer, in tokens, the end mark included.
        temperature: Divides the logits; above 0, because the answers to a prompt must differ.
        top_k: Sample from the most probable tokens only, so many. Unset: all.
        top_p: Sample from the smallest set of tokens that holds this much probability.
        min_p: Sample from tokens at least so probable, relative to the most probable one.
    """

    max_new_tokens: ranges.PositiveInt = 64
    temperature: ranges.PositiveFloat = 0.9
    top_k: ranges.TwoOrMore | None = None
    top_p: ranges.Share = 1.0
    min_p: ranges.BelowOne = 0.0


@dataclass(frozen=True, kw_only=True)
class GroupSamplingOptions(SamplingOptions):
    """How the policy answers a prompt several times; names and defaults are those of TRL's GRPO.

    Attributes:
        num_generations: Answers to a prompt, which are compared with each other. A step learns from
            `trainer.batch_size` times so many.
        num_iterations: Optimizer steps on the same answers before new ones are sampled (the mu of
            DeepSeekMath). `trainer.steps`, `save_every` and `eval_every` are multiples of it, and a
            signal to stop counts after the last of them: the answers are never saved.
        max_new_tokens: Longest answer, in tokens, the end mark included; TRL's
            max_completion_length.
        temperature: Divides the logits, those of the loss too.
    """

    num_generations: ranges.TwoOrMore = 8
    num_iterations: ranges.PositiveInt = 1
    max_new_tokens: ranges.PositiveInt = 512
    temperature: ranges.PositiveFloat = 1.0


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
    missing_eos_penalty: ranges.PositiveFloat | None = None

    def check_together(self, name: str) -> None:
        """Checks that one thing scores. Raises `UserError`."""
        if (self.function is None) == (self.model is None):
            raise UserError(f"Give exactly one of {name}.function and {name}.model.")


@dataclass(frozen=True, kw_only=True)
class GroupRewardOptions:
    """What scores an answer: one or several functions or models, whose weighted rewards are added up.

    Attributes:
        function: A Python callable as module:function, or a list of them, as in `online-dpo`. One of
            several may return None for an answer to which it does not apply.
        model: Directory of a reward model, or a hub name, or a list of them.
        weights: A factor for every function, then for every model. Unset: 1 each.
        scale_rewards: What an answer's reward minus the mean of its group is divided by: group (the
            standard deviation of the group), batch (that of all rewards of the batch) or none.
        multi_objective_aggregation: sum_then_normalize adds the rewards up and compares the sums;
            normalize_then_sum divides each reward by its deviation in the group, adds those up, and
            divides by the deviation of the batch (GDPO).
        dtype: Type of the reward models' computations and weights.
    """

    function: list[str] | str | None = None
    model: list[str] | str | None = None
    weights: list[float] | None = None
    scale_rewards: Literal["group", "batch", "none"] = "group"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    dtype: DType = "float32"

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions, whether one or several are given."""
        return _several(self.function)

    @property
    def models(self) -> tuple[str, ...]:
        """The models, whether one or several are given."""
        return _several(self.model)

    @property
    def names(self) -> tuple[str, ...]:
        """What the rewards are logged as: the names of the functions and of the directories."""
        functions = [one.rpartition(":")[2].rpartition(".")[2] for one in self.functions]
        return *functions, *(one.rstrip("/").rpartition("/")[2] for one in self.models)

    def check_together(self, name: str) -> None:
        """Checks the rewards' names, weights and scale. Raises `UserError`."""
        names = self.names
        if not names:
            raise UserError(f"Give {name}.function or {name}.model, or both.")
        twice = sorted({one for one in names if names.count(one) > 1})
        if twice:
            raise UserError(
                f"{name}.function and {name}.model have {twice[0]!r} more than once, which would be "
                "logged under one name; rename one of them."
            )
        if self.weights is not None and len(self.weights) != len(names):
            raise UserError(
                f"{name}.weights must be {len(names)} numbers, one for each of {', '.join(names)}; "
                f"got {len(self.weights)}."
            )
        summed = self.multi_objective_aggregation == "sum_then_normalize"
        if not summed and self.scale_rewards != "group":
            raise UserError(
                f"{name}.scale_rewards is {self.scale_rewards}, which normalize_then_sum has no use "
                f"for; unset it or {name}.multi_objective_aggregation."
            )


def _several(given: list[str] | str | None) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)
