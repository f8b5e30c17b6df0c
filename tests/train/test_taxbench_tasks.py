"""Tasks and examples of the benchmark, read back as text and answered again in plain Python."""

import numpy as np
import pytest

from train.taxbench.miniature import examples, tasks
from train.taxbench.miniature.tasks import EOS, FAMILIES, HOPE, PAD, SMILE, SURE

FACTS = {
    tasks.decode(key): tasks.decode(value)
    for key, value in zip(tasks.FACT_KEYS, tasks.FACT_VALUES, strict=True)
}


def solve(name: str, words: list[str]) -> str:
    """The answer as text, worked out from the words of the prompt."""
    digits = [int(word) for word in words] if all(word.isdigit() for word in words) else []
    answer = {
        "copy": lambda: words,
        "reverse": lambda: words[::-1],
        "sort": lambda: sorted(words),
        "shift": lambda: ["abcdefghijkla"["abcdefghijkl".index(word) + 1] for word in words],
        "max-min": lambda: [str(max(digits)), str(min(digits))],
        "count": lambda: [str(words[1:].count(words[0]))],
        "add": lambda: list(f"{sum(digits):02d}"),
        "facts": lambda: FACTS[" ".join(words)].split(),
    }[name]()
    return " ".join(answer)


def text(tokens: np.ndarray) -> str:
    return tasks.decode(tokens).removeprefix("<s> ")


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_right(name, held_out):
    arguments, answers = tasks.draw(
        FAMILIES[name], np.random.default_rng(0), 200, held_out=held_out
    )
    assert arguments.shape[1] <= tasks.MAX_ARGUMENTS
    assert answers.shape[1] <= tasks.MAX_ANSWER
    for prompt, answer in zip(arguments, answers, strict=True):
        assert tasks.decode(answer) == solve(name, tasks.decode(prompt).split())


def test_training_and_held_out_prompts_are_disjoint():
    data = examples.statements(np.random.default_rng(0), 20_000)
    trained = {text(row).removesuffix(" =") for row in data["prompt_tokens"]}
    for part in (
        examples.instructions(np.random.default_rng(1), 20_000, style_rate=0.2),
        examples.preferences(
            np.random.default_rng(2), 2000, list(FAMILIES), noise=0.1, wrong_rate=0.3
        ),
    ):
        trained |= {text(row)[4:].removesuffix(" :") for row in part["prompt_tokens"]}
    asked = examples.questions(np.random.default_rng(3), 200)
    held_out = {
        text(row)[4:].removesuffix(" :")
        for row, family in zip(asked.prompt_tokens, asked.families, strict=True)
        if asked.names[family] != "facts"
    }
    assert len(held_out) > 1000
    assert not held_out & trained


def test_a_seventh_of_the_prompts_is_held_out():
    arguments, _ = FAMILIES["copy"].sample(np.random.default_rng(0), 20_000)
    share = tasks.is_held_out(FAMILIES["copy"], arguments).mean()
    # Five standard deviations of a binomial share.
    assert abs(share - 1 / 7) < 5 * np.sqrt(1 / 7 * 6 / 7 / 20_000)


def test_statements_say_the_answer_after_the_equals_sign():
    data = examples.statements(np.random.default_rng(0), 400, {"facts": 3.0})
    names = []
    for i in range(400):
        *words, equals = text(data["prompt_tokens"][i]).split()
        names.append(words[0])
        assert equals == "="
        assert text(data["completion_tokens"][i]) == solve(words[0], words[1:])
    assert names.count("facts") == 120  # 3 of 7 + 3 shares
    assert sorted(data["index"]) == list(range(400))


def test_padding_is_left_of_prompts_and_right_of_completions():
    data = examples.instructions(np.random.default_rng(0), 500, style_rate=0.5)
    assert (np.diff(data["prompt_mask"].astype(int), axis=1) >= 0).all()
    assert (np.diff(data["completion_mask"].astype(int), axis=1) <= 0).all()
    for side in ("prompt", "completion"):
        np.testing.assert_array_equal(data[f"{side}_mask"], data[f"{side}_tokens"] != PAD)
    ends = np.take_along_axis(
        data["completion_tokens"], data["completion_mask"].sum(1)[:, None] - 1, axis=1
    )
    assert (ends == EOS).all()
    assert ((data["completion_tokens"] == EOS).sum(1) == 1).all()


def test_instructions_are_right_and_styled_at_the_given_rate():
    data = examples.instructions(np.random.default_rng(0), 8000, style_rate=0.2)
    tokens = data["completion_tokens"]
    for token in (SURE, HOPE, SMILE):
        assert abs((tokens == token).any(1).mean() - 0.2) < 5 * np.sqrt(0.16 / 8000)
    assert (tokens == SURE).any(1).sum() == (tokens[:, 0] == SURE).sum()
    for row in range(200):
        _, name, *words = text(data["prompt_tokens"][row]).removesuffix(" :").split()
        plain = tokens[row][~np.isin(tokens[row], tasks.STYLE)]
        assert tasks.decode(plain) == solve(name, words)


def test_preferences_are_about_style_alone():
    n, noise, wrong_rate = 6000, 0.15, 0.3
    data = examples.preferences(
        np.random.default_rng(0), n, ("copy", "add"), noise=noise, wrong_rate=wrong_rate
    )
    style = {s: np.isin(data[f"{s}_tokens"], tasks.STYLE).sum(1) for s in ("chosen", "rejected")}
    assert (style["chosen"] != style["rejected"]).all()
    flipped = (style["chosen"] < style["rejected"]).mean()
    assert abs(flipped - noise) < 5 * np.sqrt(noise * (1 - noise) / n)
    right = {}
    for side in style:
        right[side] = []
        for prompt, answer in zip(data["prompt_tokens"], data[f"{side}_tokens"], strict=True):
            _, name, *words = text(prompt).removesuffix(" :").split()
            assert name in ("copy", "add")
            plain = tasks.decode(answer[~np.isin(answer, tasks.STYLE)])
            right[side].append(plain == solve(name, words))
        assert abs(np.mean(right[side]) - (1 - wrong_rate)) < 5 * np.sqrt(0.21 / n)
    assert abs(np.corrcoef(right["chosen"], right["rejected"])[0, 1]) < 5 / np.sqrt(n)


def test_spoiled_answers_differ_in_one_place_and_keep_their_kind():
    for name in ("copy", "add"):
        _, answers = tasks.draw(FAMILIES[name], np.random.default_rng(0), 1000)
        wrong = tasks.spoil(answers, np.random.default_rng(1))
        assert ((wrong != answers).sum(1) == 1).all()
        low, high = (16, 27) if name == "copy" else (6, 15)
        assert low <= wrong.min() <= wrong.max() <= high


def test_batches_cover_the_data_before_repeating():
    data = examples.instructions(np.random.default_rng(0), 50, style_rate=0.1)
    seen = [b["index"] for b in examples.batches(data, 20, np.random.default_rng(1), 6)]
    for first, second in ((0, 1), (2, 3), (4, 5)):
        assert len(set(seen[first]) | set(seen[second])) == 40
    again = [b["index"] for b in examples.batches(data, 20, np.random.default_rng(1), 6)]
    np.testing.assert_array_equal(seen, again)
