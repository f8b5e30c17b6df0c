"""Sizes of the second scale: the reduced one for a CPU, and the full one."""

from __future__ import annotations

import dataclasses

from train.config import DType


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained on and asked. Rows that are longer are left out, never cut.

    Lengths are the most tokens that are allowed, and None takes all of a kind.
    """

    sft_steps: int
    dpo_steps: int  # the same for every method
    learning_rate: float  # AdamW's peak in alignment; few steps need a larger one to cost anything
    batch_size: int  # examples or pairs in a step
    buckets: int | None  # shapes of batches, each compiled once a method; None: training's default
    points: int  # evaluations along every alignment, the last step's included
    sft_lengths: tuple[int, int]  # of a prompt and of an answer
    pair_lengths: tuple[int, int]  # of a prompt and of an answer of a preference
    alpaca_pairs: int  # preferences judged by GPT-4 beside the HH-RLHF pairs
    held_out: float  # share of the preferences' prompts
    items: int | None  # questions of each task, spread evenly over its file
    passages: int | None  # questions of XQuAD, which come with a passage
    question_tokens: int  # length of a question, passage included
    choice_tokens: int  # length of a question's own choices; all are padded to the longest
    greedy_items: int | None  # GSM8K problems that are also answered in full, greedily
    greedy_tokens: int  # length of such an answer
    articles: int | None  # of WikiText
    article_tokens: int | None  # scored of each article; None: all, in overlapping windows
    weights: tuple[float, ...]  # of AdamW's model in merges with the SFT model
    lambdas: tuple[float, ...]  # shares of τ that are added after training
    lambda_weights: tuple[float, ...]  # of AdamW's model in merges with these shares
    dtype: DType  # of the computations


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
