"""Which records a command reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from train.config import ranges
from train.config.base import UserError, require


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Prompts, and how they become tokens.

    Attributes:
        path: A .json, .jsonl, .jsonl.gz or .parquet file, or the name of a data set on the hub, with
            its configuration as in openai/gsm8k:main if it has several.
        split: Split of a hub data set.
        eval_fraction: Share of `path` held out for evaluation, by prompt: a prompt never lands on
            both sides. Of pairs of text without a `prompt`, what both answers begin with counts as
            it, up to the last "Assistant:" where turns are marked. Unset: nothing is held out.
        split_seed: Seed of that split, apart from `trainer.seed` so that runs share their held-out
            records.
        max_prompt_length: Tokens a prompt may have, the chat template included; longer ones lose
            tokens as `truncation` says, and are counted.
        template: auto (messages through the tokenizer's chat template, strings as they are) or chat
            (strings too become turns of a conversation).
        truncation: What stays of a prompt that is too long: keep_end (the last turns) or keep_start.
            Answers always keep their start.
        prefix_sharing: Compute the prompt of a pair once for both answers, which a mask keeps apart;
            true, false, or auto: where prompts are at least a tenth of the tokens.
    """

    path: str
    split: str = "train"
    eval_fraction: ranges.OpenUnitInterval | None = None
    split_seed: ranges.Seed = 0
    max_prompt_length: ranges.PositiveInt = 512
    template: Literal["auto", "chat"] = "auto"
    truncation: Literal["keep_end", "keep_start"] = "keep_end"
    prefix_sharing: bool | Literal["auto"] = "auto"


@dataclass(frozen=True, kw_only=True)
class RecordOptions(PromptOptions):
    """Records, and how they become tokens.

    Attributes:
        max_completion_length: Tokens an answer may have, the end mark included; longer ones lose
            their end, and are counted.
    """

    max_completion_length: ranges.PositiveInt = 512


@dataclass(frozen=True, kw_only=True)
class PromptDataOptions(PromptOptions):
    """Prompts, and those to evaluate on. Answers in the records are ignored.

    Attributes:
        mix: Further data sets, each with a weight: how often its records come in an epoch in which
            those of `path` come once. 0.5 takes half of them, drawn anew in every epoch; 2 takes
            them twice. In YAML: ``mix: {maths.jsonl: 0.5}``.
        eval_path: A separate file or data set to evaluate on, instead of `eval_fraction`. With
            neither nothing is evaluated.
        eval_split: Split of `eval_path` where it is a data set on the hub, which may be that of
            `path` with another split. Unset: test.
        buckets: Shapes of batches, at most: records of similar length are batched together, so that
            little padding is computed, and every shape is compiled once. 1: batches of any records,
            as wide as the longest. Unset: up to 16, fewer where there are few batches.
    """

    mix: dict[str, ranges.PositiveFloat] = field(default_factory=dict)
    eval_path: str | None = None
    eval_split: str | None = None
    buckets: ranges.PositiveInt | None = None

    def check_together(self, name: str) -> None:
        """Checks that each source is given once. Raises `UserError`."""
        if self.eval_path is not None and self.eval_fraction is not None:
            raise UserError(
                f"{name}.eval_path and {name}.eval_fraction are both set; give the file to evaluate "
                "on, or the share to hold out."
            )
        if self.eval_split is not None and self.eval_path is None:
            raise UserError(
                f"{name}.eval_split is {self.eval_split!r}, but there is no {name}.eval_path that it "
                f"is a split of; give it, or unset {name}.eval_split."
            )
        other = f"of other data sets than {name}.path"
        require(self.path not in self.mix, f"{name}.mix", self.path, other)


@dataclass(frozen=True, kw_only=True)
class DataOptions(PromptDataOptions, RecordOptions):
    """Training records, and those to evaluate on."""


@dataclass(frozen=True, kw_only=True)
class SFTDataOptions(DataOptions):
    """Training examples, and those to evaluate on.

    Attributes:
        packing: Put several examples into one row, so that hardly any padding is computed. They see
            nothing of each other, and the loss stays the mean over the tokens of the answers.
            `trainer.batch_size` and `trainer.epochs` then count rows. Which examples share a row
            is decided once, by best-fit decreasing (TRL's packing_strategy "bfd"); those that
            are held out are not packed.
        packed_length: Tokens of a packed row. Unset: max_prompt_length + max_completion_length.
    """

    packing: bool = False
    packed_length: ranges.PositiveInt | None = None

    def check_together(self, name: str) -> None:
        """Checks the settings of packed rows as well. Raises `UserError`."""
        super().check_together(name)
        if self.packed_length is not None and not self.packing:
            raise UserError(
                f"{name}.packed_length is {self.packed_length}, but {name}.packing is not set; set "
                "it, or unset the length."
            )
        if self.packing and self.buckets is not None:
            raise UserError(
                f"{name}.buckets is {self.buckets}, but packed rows have one shape; unset it, or "
                f"{name}.packing."
            )
