"""Training and evaluation examples of the benchmark, as the batches the training step takes.

Everything is generated with numpy, vectorised and already padded: prompts on the left, completions
on the right, with masks. Three kinds of text exist:

* statements `reverse a b c d = d c b a`, what the base model is trained on;
* instructions `ask reverse a b c d :` with answers, what the fine-tuned model is trained on; an
  answer may carry style tokens;
* preference pairs, which differ in style; whether an answer is right says nothing about which of
  the two is chosen.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from train.taxbench.miniature import tasks
from train.taxbench.miniature.tasks import FAMILIES, Family

Batch = dict[str, np.ndarray]

STATEMENT_PROMPT = 2 + tasks.MAX_ARGUMENTS + 1  # <s> family arguments =
STATEMENT_COMPLETION = tasks.MAX_ANSWER + 1  # answer </s>
INSTRUCTION_PROMPT = 3 + tasks.MAX_ARGUMENTS + 1  # <s> ask family arguments :
INSTRUCTION_COMPLETION = tasks.MAX_ANSWER + len(tasks.STYLE) + 1  # answer, style tokens, </s>


@dataclasses.dataclass(frozen=True)
class Questions:
    """Prompts to answer greedily, with what is needed to score the answers."""

    prompt_tokens: np.ndarray  # int32 [n, P], left-padded
    prompt_mask: np.ndarray  # bool [n, P]
    answers: np.ndarray  # int32 [n, MAX_ANSWER], right-padded with −1
    families: np.ndarray  # int32 [n], index into `names`
    names: tuple[str, ...]

    def by_family(self, values: np.ndarray) -> dict[str, float]:
        """Averages a number for each question over every family, rounded."""
        return {
            name: round(float(values[self.families == i].mean()), 4)
            for i, name in enumerate(self.names)
        }


def _prompts(
    family: Family, arguments: np.ndarray, *, instruct: bool
) -> tuple[np.ndarray, np.ndarray]:
    opening = [tasks.BOS, tasks.ASK, family.token] if instruct else [tasks.BOS, family.token]
    closing = tasks.REPLY if instruct else tasks.EQUALS
    width = INSTRUCTION_PROMPT if instruct else STATEMENT_PROMPT
    n, k = arguments.shape
    length = len(opening) + k + 1
    tokens = np.full((n, width), tasks.PAD, np.int32)
    tokens[:, width - length : -1 - k] = opening
    tokens[:, -1 - k : -1] = arguments
    tokens[:, -1] = closing
    mask = np.broadcast_to(np.arange(width) >= width - length, tokens.shape)
    return tokens, mask


def _completions(
    answers: np.ndarray, style: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lays out `[Sure!] answer [hope] [smile] </s>`; `style` is bool [n, 3]."""
    fixed = np.tile(np.array([*tasks.STYLE, tasks.EOS], np.int32), (len(answers), 1))
    tokens = np.concatenate([fixed[:, :1], answers, fixed[:, 1:]], axis=1)
    ones = np.ones(answers.shape, bool)
    keep = np.concatenate([style[:, :1], ones, style[:, 1:], ones[:, :1]], axis=1)
    # A stable sort on "dropped" moves the kept tokens to the front without changing their order.
    order = np.argsort(~keep, axis=1, kind="stable")
    length = keep.sum(1, keepdims=True)
    mask = np.arange(width) < length
    laid_out = np.take_along_axis(tokens, order, axis=1)[:, :width]
    laid_out = np.pad(laid_out, ((0, 0), (0, width - laid_out.shape[1])))
    return np.where(mask, laid_out, tasks.PAD), mask


def _shuffled(parts: Sequence[Batch], rng: np.random.Generator) -> Batch:
    n = sum(len(part["prompt_tokens"]) for part in parts)
    order = rng.permutation(n)
    batch = {key: np.concatenate([part[key] for part in parts])[order] for key in parts[0]}
    return batch | {"index": np.arange(n, dtype=np.int32)}


def _counts(n: int, names: Sequence[str], weights: Mapping[str, float]) -> dict[str, int]:
    """Shares `n` out by weight (1 where none is given), exactly."""
    share = np.array([weights.get(name, 1.0) for name in names])
    edges = np.round(np.cumsum(share / share.sum()) * n).astype(int)
    return dict(zip(names, np.diff(edges, prepend=0).tolist(), strict=True))


def statements(
    rng: np.random.Generator, n: int, weights: Mapping[str, float] | None = None
) -> Batch:
    """Draws raw statements of every family, for the base model.

    `weights` are relative frequencies by family, 1 where absent. The batch has `n` rows of
    prompt_tokens, prompt_mask, completion_tokens, completion_mask and index.
    """
    return _supervised(rng, n, weights or {}, style_rate=None)


def instructions(rng: np.random.Generator, n: int, style_rate: float) -> Batch:
    """Draws questions of every family with right answers, for supervised fine-tuning.

    `style_rate` is the probability of each style token, independently. The batch has the columns of
    `statements`.
    """
    return _supervised(rng, n, {}, style_rate)


def _supervised(
    rng: np.random.Generator, n: int, weights: Mapping[str, float], style_rate: float | None
) -> Batch:
    """Draws instructions with style, or raw statements where `style_rate` is None."""
    instruct = style_rate is not None
    width = INSTRUCTION_COMPLETION if instruct else STATEMENT_COMPLETION
    parts = []
    for name, count in _counts(n, tuple(FAMILIES), weights).items():
        arguments, answers = tasks.draw(FAMILIES[name], rng, count)
        prompt, prompt_mask = _prompts(FAMILIES[name], arguments, instruct=instruct)
        shape = (count, len(tasks.STYLE))
        style = rng.random(shape) < style_rate if instruct else np.zeros(shape, bool)
        tokens, mask = _completions(answers, style, width)
        part = {"prompt_tokens": prompt, "prompt_mask": prompt_mask}
        parts.append(part | {"completion_tokens": tokens, "completion_mask": mask})
    return _shuffled(parts, rng)


def preferences(
    rng: np.random.Generator, n: int, families: Sequence[str], *, noise: float, wrong_rate: float
) -> Batch:
    """Draws pairs of answers of which the one with more style is preferred.

    The batch has `n` rows of prompt_tokens, prompt_mask, chosen_tokens, chosen_mask, rejected_tokens,
    rejected_mask and index, without the reference's log-probabilities.

    Args:
        rng: source of randomness.
        n: number of pairs.
        families: the families asked about; alignment never sees the others.
        noise: probability that a label is flipped.
        wrong_rate: probability that an answer is wrong, independently for the two sides of a pair,
            so that the preference says nothing about correctness.
    """
    parts = []
    for name, count in _counts(n, families, {}).items():
        arguments, answers = tasks.draw(FAMILIES[name], rng, count)
        prompt, prompt_mask = _prompts(FAMILIES[name], arguments, instruct=True)
        more, less = _unequal_styles(rng, count)
        flip = rng.random((count, 1)) < noise
        part: Batch = {"prompt_tokens": prompt, "prompt_mask": prompt_mask}
        for side, style in (
            ("chosen", np.where(flip, less, more)),
            ("rejected", np.where(flip, more, less)),
        ):
            wrong = rng.random((count, 1)) < wrong_rate
            given = np.where(wrong, tasks.spoil(answers, rng), answers)
            tokens, mask = _completions(given, style, INSTRUCTION_COMPLETION)
            part |= {f"{side}_tokens": tokens, f"{side}_mask": mask}
        parts.append(part)
    return _shuffled(parts, rng)


def _unequal_styles(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws two styles, bool [n, 3] each, uniformly among the pairs where the first has more tokens."""
    bits = (np.arange(8)[:, None] >> np.arange(3)) & 1 > 0
    first, second = np.nonzero(bits.sum(1)[:, None] > bits.sum(1)[None, :])
    pick = rng.integers(0, len(first), n)
    return bits[first[pick]], bits[second[pick]]


def questions(rng: np.random.Generator, per_family: int) -> Questions:
    """Draws held-out questions of every family (for the memorised facts, the facts themselves)."""
    tokens, masks, answers = [], [], []
    for family in FAMILIES.values():
        arguments, right = tasks.draw(family, rng, per_family, held_out=True)
        prompt, mask = _prompts(family, arguments, instruct=True)
        tokens.append(prompt)
        masks.append(mask)
        missing = tasks.MAX_ANSWER - right.shape[1]
        answers.append(np.pad(right, ((0, 0), (0, missing)), constant_values=-1))
    return Questions(
        prompt_tokens=np.concatenate(tokens),
        prompt_mask=np.concatenate(masks),
        answers=np.concatenate(answers).astype(np.int32),
        families=np.repeat(np.arange(len(FAMILIES), dtype=np.int32), per_family),
        names=tuple(FAMILIES),
    )


def batches(data: Batch, batch_size: int, rng: np.random.Generator, steps: int) -> Iterator[Batch]:
    """Yields `steps` batches drawn from `data` in shuffled passes, the last partial one dropped.

    Rows are tokenised already and a step takes milliseconds, so plain indexing replaces a loader.
    """
    n = len(data["index"])
    order, start = rng.permutation(n), 0
    for _ in range(steps):
        if start + batch_size > n:
            order, start = rng.permutation(n), 0
        rows = order[start : start + batch_size]
        start += batch_size
        yield {key: value[rows] for key, value in data.items()}
