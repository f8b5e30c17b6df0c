"""Multiple choice: scores next to transformers', candidates, and the accuracies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.train.tiny_runs import make_model_dir, make_records, make_tokenizer, write_jsonl
from train.config import TaskOptions, UserError
from train.data.dataset import pad_left, pad_right
from train.evaluation.multiple_choice import Question, choice_scorer, measure, read_questions
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

    graphdef, params = split_model(from_hf(directory))
    prompts = pad_left([question.prompt for question in questions], 32, 0)
    answers = pad_right([answer for question in questions for answer in question.answers], 6, 0)
    answer_tokens, answer_mask = (part.reshape(7, 3, 6) for part in answers)
    logps, top1 = choice_scorer(graphdef)(params, *prompts, answer_tokens, answer_mask)
    assert np.asarray(top1)[0, 0].sum() == len(questions[0].answers[0])
    for row, question in enumerate(questions):
        for choice, (wanted, first) in enumerate(transformers_scores(theirs, question)):
            mask = answer_mask[row, choice]
            np.testing.assert_allclose(logps[row, choice][mask], wanted, atol=2e-5)
            np.testing.assert_array_equal(top1[row, choice][mask], first)
            assert not np.asarray(logps[row, choice])[~mask].any()


def test_accuracies_equal_those_counted_one_by_one(directory, theirs):
    questions = random_questions(11)
    graphdef, params = split_model(from_hf(directory))
    found = measure(
        choice_scorer(graphdef), params, questions, batch_size=4, pad_id=0, shown_as="test"
    )
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
    questions, skipped = read_questions("sums", task, tokenizer, 2048)
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
    questions = read_questions("sums", task, tokenizer, 2048)[0]
    drawn = [[str(tokenizer.decode(a)) for a in question.answers] for question in questions]
    for right, *wrong in drawn:
        assert set(wrong) <= pool
        assert not any(right.startswith(other) or other.startswith(right) for other in wrong)
    assert read_questions("sums", task, tokenizer, 2048)[0] == questions
    limited = TaskOptions(path=task.path, prompt=PROMPT, answer=task.answer, limit=5)
    assert read_questions("sums", limited, tokenizer, 2048)[0] == questions[:5]
    other_seed = TaskOptions(path=task.path, prompt=PROMPT, answer=task.answer, seed=1)
    assert read_questions("sums", other_seed, tokenizer, 2048)[0] != questions


def test_plain_text_has_one_space_and_no_template(task):
    tokenizer = make_tokenizer()
    plain = TaskOptions(path=task.path, prompt=PROMPT, answer="{number:g}", chat_template=False)
    question = read_questions("sums", plain, tokenizer, 2048)[0][0]
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
        read_questions("sums", options, make_tokenizer(), 2048)
    assert message in str(caught.value)
