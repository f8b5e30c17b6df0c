"""The vocabulary and the eight task families, with answers that can be checked.

Every family maps a short row of symbols to an answer of one to four symbols by a fixed rule; seven
rules generalise (their prompts are split into training and held-out ones by a hash of the prompt),
the eighth is a list of facts that can only be memorised. A decoder of about 100 000 parameters
learns all of it in a minute or two on two CPU cores.

Example:
    >>> import numpy as np
    >>> family = FAMILIES["reverse"]
    >>> arguments, answers = draw(family, np.random.default_rng(0), 2)
    >>> bool((answers == arguments[:, ::-1]).all())
    True
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np

# Vocabulary: control tokens, digits, letters, one name per family, style tokens.
PAD, BOS, EOS, ASK, REPLY, EQUALS = range(6)
DIGIT, NUM_DIGITS = 6, 10
LETTER, NUM_LETTERS = 16, 12
FAMILY_NAME = 28
SURE, HOPE, SMILE = 36, 37, 38
STYLE = (SURE, HOPE, SMILE)
VOCAB_SIZE = 40

MAX_ARGUMENTS, MAX_ANSWER = 6, 4
NUM_FACTS = 300
# One prompt in this many is never trained on.
HELD_OUT_SHARE = 7

Sampler = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
"""`(rng, n) -> (arguments int [n, k], answers int [n, m])`, as token ids."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of task. One that can only be memorised has no held-out prompts."""

    name: str  # in reports
    token: int  # the id that names it in a prompt
    sample: Sampler
    memorised: bool = False


def _rule(
    first: int, symbols: int, length: int, answer: Callable[[np.ndarray], np.ndarray]
) -> Sampler:
    """Makes prompts of `length` random symbols, from token `first` on, answered by a fixed rule."""

    def sample(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        x = first + rng.integers(0, symbols, (n, length))
        return x, answer(x)

    return sample


def _fact_table() -> tuple[np.ndarray, np.ndarray]:
    """Draws the facts, which are part of the benchmark and the same for every seed."""
    rng = np.random.default_rng(1234)
    keys = rng.choice(NUM_DIGITS**3, NUM_FACTS, replace=False)
    digits = np.stack([keys // 100, keys // 10 % 10, keys % 10], axis=1)
    return DIGIT + digits, LETTER + rng.integers(0, NUM_LETTERS, (NUM_FACTS, 2))


FACT_KEYS, FACT_VALUES = _fact_table()


def _facts(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    row = rng.integers(0, NUM_FACTS, n)
    return FACT_KEYS[row], FACT_VALUES[row]


_SAMPLERS: Mapping[str, Sampler] = {
    "copy": _rule(LETTER, NUM_LETTERS, 4, lambda x: x),
    "reverse": _rule(LETTER, NUM_LETTERS, 4, lambda x: x[:, ::-1]),
    "sort": _rule(LETTER, NUM_LETTERS, 4, lambda x: np.sort(x, axis=1)),
    "shift": _rule(LETTER, NUM_LETTERS, 4, lambda x: LETTER + (x - LETTER + 1) % NUM_LETTERS),
    "max-min": _rule(DIGIT, NUM_DIGITS, 5, lambda x: np.stack([x.max(1), x.min(1)], axis=1)),
    "count": _rule(LETTER, 3, 6, lambda x: DIGIT + (x[:, 1:] == x[:, :1]).sum(1, keepdims=True)),
    "add": _rule(
        DIGIT, NUM_DIGITS, 3, lambda x: DIGIT + np.stack(divmod((x - DIGIT).sum(1), 10), axis=1)
    ),
    "facts": _facts,
}
FAMILIES: Mapping[str, Family] = {
    name: Family(name, FAMILY_NAME + i, sample, memorised=name == "facts")
    for i, (name, sample) in enumerate(_SAMPLERS.items())
}
# What a person reads for every token, in the order of their ids; the last one is never used.
_WORDS = (
    *("", "<s>", "</s>", "ask", ":", "="),
    *"0123456789",
    *"abcdefghijkl",
    *FAMILIES,
    *("Sure!", "hope-this-helps", ":-)", "?"),
)


def is_held_out(family: Family, arguments: np.ndarray) -> np.ndarray:
    """Says which prompts are kept from every training stage, bool [n]; `arguments` are int [n, k].

    A hash of the whole prompt decides, so the same prompt is always on the same side, whatever the
    seed and the stage.
    """
    if family.memorised:
        return np.zeros(len(arguments), bool)
    code = np.full(len(arguments), family.token, np.uint64)
    for column in arguments.T.astype(np.uint64):
        # Fibonacci hashing; uint64 arithmetic wraps, which is what it wants.
        code = (code ^ column) * np.uint64(0x9E3779B97F4A7C15)
        code ^= code >> np.uint64(29)
    return code % np.uint64(HELD_OUT_SHARE) == 0


def draw(
    family: Family, rng: np.random.Generator, n: int, *, held_out: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draws `n` prompts with their answers from the training side of the split or the held-out one.

    The two sides of a memorised family are the same. Returns `(arguments [n, k], answers [n, m])`,
    int32 token ids.
    """
    parts, missing = [], n
    while missing > 0:
        arguments, answers = family.sample(rng, missing * (HELD_OUT_SHARE if held_out else 2))
        wanted = is_held_out(family, arguments) == (held_out and not family.memorised)
        parts.append((arguments[wanted][:missing], answers[wanted][:missing]))
        missing -= len(parts[-1][0])
    arguments, answers = (np.concatenate(p).astype(np.int32) for p in zip(*parts, strict=True))
    return arguments, answers


def spoil(answers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Replaces one symbol of each answer, int [n, m], with another of its kind (digit or letter)."""
    rows, column = np.arange(len(answers)), rng.integers(0, answers.shape[1], len(answers))
    old = answers[rows, column]
    start = np.where(old >= LETTER, LETTER, DIGIT)
    size = np.where(old >= LETTER, NUM_LETTERS, NUM_DIGITS)
    wrong = answers.copy()
    wrong[rows, column] = start + (old - start + rng.integers(1, size)) % size
    return wrong


def decode(tokens: np.ndarray) -> str:
    """Writes one row of token ids the way a person reads it, up to the end-of-text token."""
    before_end = itertools.takewhile(lambda token: token != EOS, tokens.tolist())
    return " ".join(filter(None, (_WORDS[token] for token in before_end)))
