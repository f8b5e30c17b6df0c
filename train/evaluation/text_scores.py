"""How a written answer is compared with the right ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

LAST_NUMBER = r"-?(?:\$[.,]*)?[0-9][0-9.,]*"
"""A number, perhaps with a dollar sign before it; the sign alone is no number."""

# What lm-evaluation-harness takes out of GSM8K's answers: separators, currency, a final full stop.
_IGNORED = re.compile(r",|\$|\.$")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def extract(pattern: str, text: str) -> str | None:
    """The last match of a pattern: its first group that matched, or the whole; None without any."""
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    return next((group for group in found[-1].groups() if group is not None), found[-1].group())


def normalised(answer: str) -> str:
    """An answer as it is compared: trimmed, without separators, currency and a final full stop."""
    return _IGNORED.sub("", answer.strip()).strip().lower()


def squad_words(text: str) -> list[str]:
    """The words that SQuAD compares: lower case, without punctuation and articles.

    Example:
        >>> squad_words("The Panthers' defense, 308.")
        ['panthers', 'defense', '308']
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def squad_f1(answer: str, right: Sequence[str]) -> tuple[bool, float]:
    """Whether an answer is one of the right ones, and its largest F1 over words with any of them.

    Source: the evaluation script of SQuAD 1.1 (Rajpurkar et al., 2016, arXiv:1606.05250).

    Example:
        >>> squad_f1("in Denver, Colorado", ["Denver"])
        (False, 0.5)
    """
    words = squad_words(answer)
    wanted = [squad_words(one) for one in right]
    return words in wanted, max(_f1(words, one) for one in wanted)


def _f1(found: list[str], wanted: list[str]) -> float:
    if found == wanted:  # also where neither has a word, as in SQuAD 2
        return 1.0
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0
