"""Scores, matched rewards and reports against cases worked out by hand."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from train.taxbench.miniature import plot, report
from train.taxbench.miniature.examples import Questions
from train.taxbench.miniature.methods import METHODS
from train.taxbench.miniature.scoring import is_right, style_score
from train.taxbench.miniature.sizes import DemoConfig
from train.taxbench.miniature.tasks import EOS, HOPE, PAD, SMILE, SURE
from train.taxbench.miniature.trajectories import (
    Point,
    Trajectory,
    capability_at_reward,
    compare,
    records,
)

# Generations with what they are worth: (tokens, style in thirds, right). The answer is 6 7.
CASES = [
    ([6, 7, EOS], 0, True),
    ([SURE, 6, 7, EOS], 1, True),
    ([SURE, 6, 7, HOPE, SMILE, EOS], 3, True),
    ([6, HOPE, 7, EOS], 1, True),  # style inside an answer is style
    ([SMILE, 6, 7, EOS], 0, True),  # a smile counts at the end only
    ([6, SURE, 7, EOS], 0, True),  # and "Sure!" at the start only
    ([SURE, SURE, 6, 7, EOS], 1, True),  # repeating it earns nothing
    ([6, 8, EOS], 0, False),
    ([6, EOS], 0, False),
    ([6, 7, 7, EOS], 0, False),
    ([7, 6, EOS], 0, False),
    ([EOS, 6, 7], 0, False),  # nothing after the end counts
    ([EOS, HOPE, SMILE], 0, False),
    ([SURE, 6, 7, HOPE, 7, 7, 7, SMILE], 2, False),  # no end: no smile, no answer
    ([6, 7, 7, 7, 7, 7, 7, 7], 0, False),
]


def generations() -> np.ndarray:
    return np.array([tokens + [PAD] * (8 - len(tokens)) for tokens, _, _ in CASES])


def test_style_score():
    expected = [thirds / 3 for _, thirds, _ in CASES]
    np.testing.assert_allclose(style_score(generations()), expected)


def test_right_answers():
    answers = np.tile([6, 7, -1, -1], (len(CASES), 1))
    assert is_right(generations(), answers).tolist() == [right for _, _, right in CASES]


def test_answer_of_full_length_fits():
    generated = np.array([[SURE, 16, 17, 18, 19, HOPE, SMILE, EOS]])
    assert is_right(generated, np.array([[16, 17, 18, 19]])).tolist() == [True]


@pytest.mark.parametrize(
    ("rewards", "level", "expected"),
    [
        ([0.0, 0.4, 0.8], 0.4, 0.8),  # on a point
        ([0.0, 0.4, 0.8], 0.6, 0.65),  # half-way between 0.8 and 0.5
        ([0.0, 0.7, 0.5], 0.6, 0.8 + (0.1 / 0.7) * 0.1),  # the first crossing, not the way back
        ([0.9, 0.4, 0.8], 0.6, 0.9),  # already there at the start
        ([0.0, 0.4, 0.5], 0.6, np.nan),  # never there: no extrapolation
    ],
)
def test_matched_reward(rewards, level, expected):
    value = capability_at_reward(np.array(rewards), np.array([0.9, 0.8, 0.5]), level)
    np.testing.assert_allclose(value, expected, atol=1e-12)


def test_matched_reward_of_many_trajectories_at_once():
    rewards = np.array([[0.0, 0.5, 1.0], [0.0, 0.1, 0.2]])
    capabilities = np.array([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(capability_at_reward(rewards, capabilities, 0.75), [0.25, np.nan])


def trajectory(name: str, path: list[tuple[float, float]], at: str = "step", n: int = 200):
    """A trajectory through given (reward, capability) points, exact on n questions."""
    points = []
    for index, (reward, capability) in enumerate(path):
        style = np.zeros(n)
        style[: round(reward * n)] = 1.0
        right = np.arange(n) % 100 < round(100 * capability)
        points.append(Point(10.0 * index, style, right))
    return Trajectory(name, name.upper(), f"settings of {name}", at, points)


FAMILIES = np.repeat([0, 1], 100)


def rows(level: float = 0.5):
    return compare(
        [
            trajectory("adamw", [(0, 0.9), (0.4, 0.8), (0.8, 0.4)]),
            trajectory("on_ties", [(0, 0.9), (0.6, 0.84), (0.8, 0.8)]),
            trajectory("kl", [(0, 0.9), (0.2, 0.9), (0.3, 0.85)]),
            trajectory("offline_linear", [(0, 0.9), (0.5, 0.75), (0.8, 0.4)], at="weight"),
        ],
        level,
        families=FAMILIES,
    )


def test_comparison_by_hand():
    adamw, ties, kl, offline = rows()
    assert adamw.matched == pytest.approx(0.7)  # 0.8 − (0.1 / 0.4) · 0.4
    assert adamw.gain is None
    assert adamw.reached_at == pytest.approx(12.5)
    assert ties.matched == pytest.approx(0.85)
    assert ties.gain == pytest.approx(0.15)
    assert ties.reached_at == pytest.approx(50 / 6)
    assert (kl.matched, kl.gain, kl.reached_at) == (None, None, None)
    assert kl.best_reward == pytest.approx(0.3)
    assert offline.matched == pytest.approx(0.75)
    assert (ties.final.reward, ties.final.capability) == (pytest.approx(0.8), pytest.approx(0.8))


def test_error_of_a_gain_is_that_of_the_resampled_difference():
    # Both read on a point every draw reaches, so the gain is a mean of n paired differences.
    rng = np.random.default_rng(0)
    n = 1000
    always = np.ones(n)
    start = Point(0, np.zeros(n), np.ones(n, bool))
    ours, theirs = rng.random(n) < 0.8, rng.random(n) < 0.6
    compared = compare(
        [
            Trajectory("adamw", "AdamW", "", "step", [start, Point(1, always, theirs)]),
            Trajectory("x", "X", "", "step", [start, Point(1, always, ours)]),
        ],
        1.0,
        families=np.zeros(n, int),
        resamples=2000,
    )
    difference = ours.astype(float) - theirs
    assert compared[1].gain == pytest.approx(difference.mean())
    assert compared[1].gain_error == pytest.approx(difference.std() / np.sqrt(n), rel=0.1)


def test_terminal_table_holds_every_row():
    stream = io.StringIO()
    Console(file=stream, width=160).print(report.table(rows(), 0.5, 20))
    printed = stream.getvalue()
    for expected in ("ADAMW", "70.0", "ON_TIES", "85.0", "+15.0", "not reached (best 0.30)"):
        assert expected in printed


def test_density_of_one_is_said_in_table_and_notes():
    for method in METHODS:
        assert ("(p = 1)" in method.label) == (method.optimizer.density == 1)

    def said(rows) -> tuple[bool, bool]:
        stream = io.StringIO()
        Console(file=stream, width=160).print(report.table(rows, 0.5, 20))
        in_table = "neither masks nor thresholds" in " ".join(stream.getvalue().split())
        return in_table, any("every entry is kept" in note for note in report.notes(rows, 0.5, 0))

    adamw, ties, *others = rows()
    assert said([adamw, ties, *others]) == (False, False)
    whole = dataclasses.replace(ties.trajectory, label="OnTIES (p = 1)")
    assert said([adamw, dataclasses.replace(ties, trajectory=whole), *others]) == (True, True)


def test_headline_says_what_was_measured():
    text = report.headline(rows(), 0.5)
    assert "70.0 %" in text
    assert "ON_TIES 85.0 % (+15.0 points)" in text
    assert "Not reaching it: KL" in text
    assert "did not reach a reward of 0.9" in report.headline(rows(0.9), 0.9)


def test_page_is_complete_and_needs_no_other_file(tmp_path):
    figure = tmp_path / "plot.png"
    plot.draw(rows(), 0.5, figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    answers = (["question", "SFT <model>"], [["copy a", "a </s>"]])
    text = report.page(rows(), DemoConfig(reward=0.5, seed=7), "1 s", answers, figure)
    for expected in ("settings of on_ties", "+15.0 ± ", "not reached (best 0.30)", "--seed 7"):
        assert expected in text
    assert "SFT &lt;model&gt;" in text  # escaped
    assert 'src="data:image/png;base64,' in text
    assert "$" not in text.split("base64,")[0]  # no placeholder left
    assert 'src="http' not in text


def test_plot_without_a_gain(tmp_path):
    plot.draw(rows(0.95), 0.95, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_records_are_plain_numbers_by_family():
    questions = Questions(
        np.zeros((200, 1), np.int32),
        np.ones((200, 1), bool),
        np.zeros((200, 4), np.int32),
        FAMILIES,
        ("first", "second"),
    )
    written = records(trajectory("adamw", [(0, 0.9), (0.4, 0.8)]), questions)
    assert json.loads(json.dumps(written[1])) == written[1]
    assert written[1]["method"] == "adamw"
    assert written[1]["step"] == 10
    assert written[1]["family_reward"] == {"first": 0.8, "second": 0.0}
    assert written[1]["family_capability"] == {"first": 0.8, "second": 0.8}
