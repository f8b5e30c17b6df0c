"""Settings of ``python -m train generate``."""

from __future__ import annotations

from dataclasses import dataclass

from train.config import ranges
from train.config.base import DType


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continuations of one prompt, shown as they are written, or of a file of prompts.

    Attributes:
        model: Directory in Hugging Face format, or a hub name.
        prompt: One prompt, whose answer is written to the terminal.
        prompts: A .json, .jsonl, .jsonl.gz or .parquet file, or a data set on the hub, whose
            records have a field `prompt`: a string, or a list of messages.
        split: Split of a data set on the hub.
        output: JSON lines file to write for `prompts`, each record with fields `generated`,
            `generated_tokens` and `finish_reason` (`stop` or `length`) added; it must not exist yet.
            After an interrupt the same command goes on with the file that ends in .partial. What
            JSON has no type for, such as a date, becomes text.
        chat_template: Make a user turn of prompts that are strings; otherwise they are continued as
            plain text. Lists of messages always take the chat template.
        max_new_tokens: Longest continuation, in tokens.
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Sample from the most probable tokens only, so many. Unset: all.
        top_p: Sample from the smallest set of tokens that holds this much probability.
        min_p: Sample from tokens at least so probable, relative to the most probable one.
        seed: Seed of the draws. A prompt's own number in the file counts too, the batch does not.
        batch_size: Prompts continued at once.
        dtype: Type of the computations; parameters stay float32.
    """

    model: str
    prompt: str | None = None
    prompts: str | None = None
    split: str = "train"
    output: str | None = None
    chat_template: bool = True
    max_new_tokens: ranges.PositiveInt = 256
    temperature: ranges.NonNegativeFloat = 1.0
    top_k: ranges.PositiveInt | None = None
    top_p: ranges.Share = 1.0
    min_p: ranges.ClosedUnitInterval = 0.0
    seed: ranges.Seed = 0
    batch_size: ranges.PositiveInt = 16
    dtype: DType = "float32"
