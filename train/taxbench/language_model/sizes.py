"""Sizes of the second scale: the reduced one for a CPU, and the full one."""

from __future__ import annotations

import dataclasses

from train.config import DType


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained on and asked. Rows that are longer are left out, never cut.

    Attributes:
        sft_steps: Steps of fine-tuning.
        dpo_steps: Steps of alignment, the same for every method.
        learning_rate: Peak rate of AdamW in alignment; few steps need a larger one to cost anything.
        batch_size: Examples or pairs in a step.
        buckets: Shapes of batches, each of which is compiled once for every method; None for as many as
            training takes by itself.
        points: Evaluations along every alignment, the last step's included.
        sft_lengths: Tokens of a prompt and of an answer, at most.
        pair_lengths: Tokens of a prompt and of an answer of a preference, at most.
        alpaca_pairs: Preferences judged by GPT-4 beside the HH-RLHF pairs.
        held_out: Share of the preferences' prompts that is held out.
        items: Questions of each task, spread evenly over its file; None for all.
        passages: Questions of XQuAD, which come with a passage; None for all.
        question_tokens: Tokens of a question, passage included, at most.
        choice_tokens: Tokens of each of a question's own choices, at most; all are padded to the
            longest.
        greedy_items: GSM8K problems that are also answered in full, greedily.
        greedy_tokens: Tokens of such an answer, at most.
        articles: WikiText articles; None for all.
        article_tokens: Tokens that are scored of each; None for all, in overlapping windows.
        weights: Weights of AdamW's model in merges with the SFT model.
        lambdas: Shares of τ that are added after training.
        lambda_weights: Weights of AdamW's model with these.
        dtype: Type of the computations.
    """

    sft_steps: int
    dpo_steps: int
    learning_rate: float
    batch_size: int
    buckets: int | None
    points: int
    sft_lengths: tuple[int, int]
    pair_lengths: tuple[int, int]
    alpaca_pairs: int
    held_out: float
    items: int | None
    passages: int | None
    question_tokens: int
    choice_tokens: int
    greedy_items: int | None
    greedy_tokens: int
    articles: int | None
    article_tokens: int | None
    weights: tuple[float, ...]
    lambdas: tuple[float, ...]
    lambda_weights: tuple[float, ...]
    dtype: DType


SIZES = {
    "reduced": Size(
        sft_steps=60,
        dpo_steps=40,
        learning_rate=1e-4,
        batch_size=8,
        buckets=3,
        points=2,
        sft_lengths=(96, 128),
        pair_lengths=(96, 48),
        alpaca_pairs=0,
        held_out=0.2,
        items=96,
        passages=48,
        question_tokens=160,
        choice_tokens=12,
        greedy_items=16,
        greedy_tokens=96,
        articles=16,
        article_tokens=256,
        weights=(0.25, 0.5, 0.75),
        lambdas=(0.1,),
        lambda_weights=(0.0, 0.5, 1.0),
        dtype="float32",
    ),
    "full": Size(
        sft_steps=600,
        dpo_steps=160,
        learning_rate=2e-5,
        batch_size=32,
        buckets=None,
        points=4,
        sft_lengths=(512, 512),
        pair_lengths=(512, 384),
        alpaca_pairs=4000,
        held_out=0.1,
        items=None,
        passages=None,
        question_tokens=1024,
        choice_tokens=64,
        greedy_items=None,
        greedy_tokens=256,
        articles=None,
        article_tokens=None,
        weights=(0.2, 0.4, 0.6, 0.8),
        lambdas=(0.05, 0.1, 0.2),
        lambda_weights=(0.0, 0.5, 1.0),
        dtype="bfloat16",
    ),
}
