"""Multiple choice: scores next to transformers', candidates, and the accuracies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from tests.train.tiny_runs import make_model_dir, make_records, make_tokenizer, write_jsonl
from train.config import TaskOptions, UserError
from train.evaluation.likelihoods import (
    Query,
    joined_rows,
    likelihood_scorer,
    scored_statistics,
)
from train.evaluation.multiple_choice import Question, Questions, accuracies, read_questions
from train.models import from_hf, split_model

PROMPT = "{prompt[0][content]}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_model_dir(tmp_path_factory.mktemp("model"), 3)


@pytest.fixture
def task(tmp_path):
    path = write_jsonl(tmp_path / "sums.jsonl", make_records(30))
    return TaskOptions(path=str(path), prompt=PROMPT, answer="{number:g}")


def random_questions(count: int = 7) -> list[Question]:
    rng = np.random.default_rng(1)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(2, 250, rng.integers(low, high)).tolist()

    return [Question(tokens(1, 30), [tokens(1, 6) for _ in range(3)]) for _ in range(count)]


@pytest.fixture(scope="module")
def theirs(directory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more cost more than they bring on a model this small
    yield AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def transformers_logits(model, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].double()


def transformers_scores(model, question: Question):
    """Log-probability of every answer token, and whether it was the most likely, one by one."""
    scores = []
    for answer in question.answers:
        logits = transformers_logits(model, question.prompt + answer)
        predictions = logits[len(question.prompt) - 1 : -1]
        targets = torch.tensor(answer)
        logps = predictions.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        scores.append((logps.numpy(), (predictions.argmax(-1) == targets).numpy()))
    return scores


def test_scores_equal_those_of_each_candidate_alone(directory, theirs):
    questions = random_questions()
    # The model's own continuation, so that some tokens are the most likely ones.
    answer = questions[0].answers[0]
    answer.clear()
    for _ in range(4):
        answer.append(int(transformers_logits(theirs, questions[0].prompt + answer)[-1].argmax()))

    rows = joined_rows(questions, 24, 0)
    model = from_hf(directory)
    logps, top1, numbers = map(
        np.asarray, nnx.jit(scored_statistics, static_argnums=2)(model, rows, 3)
    )
    assert top1[0][numbers[0] == 1].sum() == len(questions[0].answers[0])
    for row, question in enumerate(questions):
        for choice, (wanted, first) in enumerate(transformers_scores(theirs, question), 1):
            found = numbers[row] == choice
            np.testing.assert_allclose(logps[row][found], wanted, atol=2e-5)
            np.testing.assert_array_equal(top1[row][found], first)
        assert np.count_nonzero(numbers[row]) == question.scored


def test_a_single_answer_is_scored_as_among_others(directory):
    questions = random_questions()
    graphdef, params = split_model(from_hf(directory))
    score = likelihood_scorer(graphdef, batch_size=3, pad_id=0)
    alone = [Query(one.prompt, [answer]) for one in questions for answer in one.answers]
    together, single = score(params, questions), score(params, alone)
    np.testing.assert_allclose(single[0].reshape(7, 3), together[0], rtol=1e-5)
    np.testing.assert_array_equal(single[1].reshape(7, 3), together[1])


def test_accuracies_equal_those_counted_one_by_one(directory, theirs):
    questions = random_questions(11)
    graphdef, params = split_model(from_hf(directory))
    score = likelihood_scorer(graphdef, batch_size=4, pad_id=0)
    found = accuracies(score, params, Questions(questions, 0), shown_as="test")
    scored = [transformers_scores(theirs, question) for question in questions]
    sums = np.array([[logps.sum() for logps, _ in row] for row in scored])
    means = np.array([[logps.mean() for logps, _ in row] for row in scored])
    assert 0 < (sums.argmax(1) == 0).mean() < 1
    assert found["accuracy"] == pytest.approx((sums.argmax(1) == 0).mean())
    assert found["accuracy_per_token"] == pytest.approx((means.argmax(1) == 0).mean())
    assert found["exact"] == pytest.approx(np.mean([row[0][1].all() for row in scored]))
    assert found["logp"] == pytest.approx(sums[:, 0].mean(), rel=1e-5)
    assert found["questions"] == 11


def test_questions_hold_the_right_answer_first_and_no_end(task):
    tokenizer = make_tokenizer()
    questions, skipped = read_questions("tasks.sums", task, tokenizer, 2048)
    records = make_records(30)
    assert (len(questions), skipped) == (30, 0)
    for question, record in zip(questions, records, strict=True):
        texts = [str(tokenizer.decode(answer)) for answer in question.answers]
        assert texts[0] == str(record["number"])
        assert len(set(texts)) == 4
        assert str(tokenizer.decode(question.prompt)).endswith(
            record["prompt"][0]["content"] + "<|im_end|>\n<|im_start|>assistant\n"
        )


def test_wrong_answers_are_drawn_from_the_file_and_stay_the_same(task):
    tokenizer = make_tokenizer()
    pool = {str(record["number"]) for record in make_records(30)}
    questions = read_questions("tasks.sums", task, tokenizer, 2048)[0]
    drawn = [[str(tokenizer.decode(a)) for a in question.answers] for question in questions]
    for right, *wrong in drawn:
        assert set(wrong) <= pool
        assert not any(right.startswith(other) or other.startswith(right) for other in wrong)
    assert read_questions("tasks.sums", task, tokenizer, 2048)[0] == questions
    limited = TaskOptions(path=task.path, prompt=PROMPT, answer=task.answer, limit=5)
    assert read_questions("tasks.sums", limited, tokenizer, 2048)[0] == questions[:5]
    other_seed = TaskOptions(path=task.path, prompt=PROMPT, answer=task.answer, seed=1)
    assert read_questions("tasks.sums", other_seed, tokenizer, 2048)[0] != questions


def test_plain_text_has_one_space_and_no_template(task):
    tokenizer = make_tokenizer()
    plain = TaskOptions(path=task.path, prompt=PROMPT, answer="{number:g}", chat_template=False)
    question = read_questions("tasks.sums", plain, tokenizer, 2048)[0][0]
    record = make_records(1)[0]
    assert tokenizer.decode(question.prompt) == record["prompt"][0]["content"]
    assert tokenizer.decode(question.answers[0]) == f" {record['number']}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "{total}"}, "tasks.sums.answer: '{total}' cannot be filled from sums.jsonl "),
        ({"answer": "{prompt:g}"}, "tasks.sums.answer: "),
        ({"choices": 1}, "tasks.sums.choices must be 2 or larger, got 1"),
        ({"choices": 99}, "tasks.sums.choices is 99, but the file has only"),
        ({"limit": 0}, "tasks.sums.limit must be positive, got 0"),
        ({"path": "nowhere.jsonl"}, "tasks.sums.path: Data file nowhere.jsonl does not exist"),
    ],
)
def test_bad_tasks(task, changes, message):
    options = TaskOptions(**{**vars(task), **changes})
    with pytest.raises(UserError) as caught:
        read_questions("tasks.sums", options, make_tokenizer(), 2048)
    assert message in str(caught.value)
