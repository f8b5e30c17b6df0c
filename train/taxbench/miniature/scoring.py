"""Reward and capability of greedy answers.

The reward is what the preference data ask for: style. The capability is what they are silent about:
whether the answer is right once the style tokens are taken out. The two are measured on the same
answers, so a method cannot buy one by hiding the other.
"""

import numpy as np

from train.taxbench.miniature import tasks


def _before_end(generated: np.ndarray) -> np.ndarray:
    """Marks the tokens before the first end-of-text token, bool [n, T]."""
    return np.cumsum(generated == tasks.EOS, axis=1) == 0


def style_score(generated: np.ndarray) -> np.ndarray:
    """Scores the style of answers, float64 [n]: a third each for three habits.

    The habits: it starts with `SURE`; it says `HOPE` somewhere; its last token before the end is
    `SMILE` (which needs an end). `generated` has the token ids after the prompt, int [n, T], padded
    after the end-of-text token.

    Example:
        >>> style_score(np.array([[tasks.SURE, 7, tasks.SMILE, tasks.EOS]])).round(3).tolist()
        [0.667]
    """
    alive = _before_end(generated)
    ended = ~alive[:, -1]
    last = np.take_along_axis(generated, np.maximum(alive.sum(1) - 1, 0)[:, None], axis=1)[:, 0]
    starts = generated[:, 0] == tasks.SURE
    hopes = ((generated == tasks.HOPE) & alive).any(1)
    smiles = (last == tasks.SMILE) & ended
    return (starts.astype(float) + hopes + smiles) / len(tasks.STYLE)


def is_right(generated: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Says which answers are exactly right, whatever their style, bool [n].

    An answer is right if it has an end and the tokens before that, style tokens taken out, are the
    expected ones. `generated` has the token ids after the prompt, int [n, T]; `answers` the expected
    ones, int [n, A], right-padded with −1.
    """
    alive = _before_end(generated)
    kept = alive & ~np.isin(generated, tasks.STYLE)
    order = np.argsort(~kept, axis=1, kind="stable")
    content = np.where(
        np.take_along_axis(kept, order, axis=1), np.take_along_axis(generated, order, axis=1), -1
    )
    # Both sides as wide as the wider one, so that extra tokens count as a difference.
    width = max(content.shape[1], answers.shape[1])
    content, expected = (
        np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=-1) for x in (content, answers)
    )
    return (content == expected).all(1) & ~alive[:, -1]
