"""Perplexity, exact match and listed choices, each next to transformers on a tiny model."""

from __future__ import annotations

import json
import math
import shutil

import datasets
import numpy as np
import pytest
import torch
from torchmetrics.functional.text import squad
from transformers import AutoModelForCausalLM

from tests.train.tiny_runs import flags, make_model_dir, make_tokenizer, write_jsonl
from train.cli import main
from train.config import GenerationTaskOptions, TaskOptions, TextOptions, UserError
from train.evaluation.likelihoods import Query
from train.evaluation.multiple_choice import read_questions
from train.evaluation.perplexity import Texts, perplexity, read_texts, sliding_windows
from train.evaluation.text_scores import LAST_NUMBER, extract, normalised, squad_f1
from train.evaluation.written_answers import read_problems

TEXT = "The quick brown fox jumps over the lazy dog; then it sleeps, and dreams of 12,345 hens. "
QUESTIONS = [
    {
        "q": "Sky?",
        "choices": {"label": ["1", "2", "3"], "text": ["blue", "green now", "a"]},
        "key": "2",
    },
    {"q": "Grass, in May?", "choices": {"label": ["A", "B"], "text": ["red", "green"]}, "key": "B"},
    {"q": "Snow?", "choices": {"label": ["A", "B", "C"], "text": ["x", "yy", "white"]}, "key": "C"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_model_dir(tmp_path_factory.mktemp("model"), 5)


@pytest.fixture(scope="module")
def theirs(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def evaluate(directory, tmp_path, settings):
    file = tmp_path / "eval.json"
    output = tmp_path / "results.json"
    file.write_text(json.dumps({"model": str(directory), "output": str(output), **settings}))
    assert main(["eval", "--config", str(file)]) == 0
    return json.loads(output.read_text())


def documented_nll(model, ids, max_length, stride):
    """The loop of transformers' page on perplexity; returns the sum of nll and the tokens."""
    total, count, reached = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, : -(end - reached)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=labels).loss
        tokens = int((labels != -100).sum()) - int(begin == 0)
        total += float(loss) * tokens
        count += tokens
        reached = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_perplexity(directory, theirs, tmp_path, separator):
    texts = [TEXT * 3, TEXT, "Short."]
    path = write_jsonl(tmp_path / "texts.jsonl", [{"body": text} for text in texts])
    task = {"path": str(path), "field": "body", "max_length": 64, "stride": 24}
    if separator is not None:
        task["separator"] = separator
        texts = [separator.join(texts)]  # as the page does
    found = evaluate(directory, tmp_path, {"texts": {"t": task}, "batch_size": 4})["texts"]["t"]
    tokenizer = make_tokenizer()
    sums = [documented_nll(theirs, tokenizer(text)["input_ids"], 64, 24) for text in texts]
    nll, count = (sum(column) for column in zip(*sums, strict=True))
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)


@pytest.mark.parametrize(("length", "stride"), [(7, 3), (5, 1), (64, 32)])
def test_windows_score_every_token_once(length, stride):
    tokens = list(range(50))
    scored = [t for w in sliding_windows(tokens, length, stride) for t in w.answers[0]]
    assert scored == tokens[1:]


@pytest.mark.parametrize(("nll", "expected"), [(700.0, math.exp(700)), (710.0, math.inf)])
def test_perplexity_beyond_the_largest_number_is_infinite(nll, expected):
    """What a model that training has ruined may reach."""

    def score(params, queries, shown_as):
        return np.full((len(queries), 1), -2 * nll), np.zeros((len(queries), 1), bool)

    texts = Texts([Query([1], [[2, 3]])], size=3)
    found = perplexity(score, None, texts)
    assert found["perplexity"] == expected
    assert found["nll"] == nll


def written(model, prompt):
    """What transformers writes in up to 12 tokens, without the token that ends it."""
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    tokens = out[0, ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ended = tokens[-1] in (ends if isinstance(ends, list) else [ends])
    return tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)


def test_exact_match(directory, theirs, tmp_path):
    """Answers are what transformers generates, for half of the problems."""
    records = []
    for number in range(6):
        prompt = f"{number} and {number * 7}" + "?" * number
        text = written(theirs, prompt)
        records.append({"prompt": prompt, "answer": f"so #### {text}" if number % 2 else "#### no"})
    path = write_jsonl(tmp_path / "sums.jsonl", records)
    task = {
        "path": str(path),
        "prompt": "{prompt}",
        "answer": "{answer}",
        "extract": "(?s).+",
        "answer_extract": "(?s)#### (.+)",
        "max_new_tokens": 12,
        "chat_template": False,
    }
    found = evaluate(directory, tmp_path, {"generation": {"g": task}, "batch_size": 4})
    assert found["generation"]["g"] == {"exact_match": 0.5, "extracted": 1.0, "problems": 6}


def test_extraction():
    """As lm-evaluation-harness scores GSM8K: the last number, without separators."""
    assert normalised(extract(LAST_NUMBER, "First 3, then $1,234.") or "") == "1234"
    assert extract(LAST_NUMBER, "$1,234.50 of -3 and $1,234.50") == "$1,234.50"
    assert extract(LAST_NUMBER, "4 - 7 = -3") == "-3"
    assert extract(LAST_NUMBER, "none, and no $.") is None
    assert extract("x=(a)|y=(b)", "x=a y=b") == "b"


@pytest.mark.parametrize(
    "text", ["The answer is $18$.", r"so \boxed{18}$", "**18** $", "18 US$", "$$18$$", "costs $18."]
)
def test_a_dollar_sign_is_no_number(text):
    """LaTeX closes with one, and a currency may follow its number."""
    assert normalised(extract(LAST_NUMBER, text) or "") == "18"


ANSWERS = [
    ("The Denver Broncos won it.", ["Denver Broncos", "the Broncos", "a Denver Broncos"]),
    ("308", ["308"]),
    ("an answer, an answer", ["answer answer answer"]),
    ("nothing in common", ["Santa Clara, California."]),
    ("the", ["a"]),
    ("U.S.A. (2016)", ["usa 2016", "America"]),
]


def test_squad_scores():
    """Every answer's share of equal words is torchmetrics' SQuAD."""
    for answer, right in ANSWERS:
        theirs = squad(
            {"prediction_text": answer, "id": "q"},
            {"answers": {"answer_start": [0] * len(right), "text": right}, "id": "q"},
        )
        exact, f1 = squad_f1(answer, right)
        assert [100 * exact, 100 * f1] == pytest.approx(
            [float(theirs[name]) for name in ("exact_match", "f1")]
        )


def test_squad_task(directory, theirs, tmp_path):
    """Of what transformers writes all words are right, or half of them beside as many wrong ones."""
    text = written(theirs, "Who won?")
    records = [
        {"q": "Who won?", "answers": {"text": ["no one", text]}},
        {"q": "Who won?", "answers": [f"The {text}!", "none"]},
        {"q": "Who won?", "answers": ["?"]},
    ]
    task = {"path": str(write_jsonl(tmp_path / "q.jsonl", records)), "prompt": "{q}"}
    task |= {"answers_field": "answers", "scoring": "squad", "max_new_tokens": 12}
    task |= {"chat_template": False}
    found = evaluate(directory, tmp_path, {"generation": {"g": task}, "batch_size": 2})
    scores = [squad_f1(text, answers)[1] for answers in ([text], [f"The {text}!"], ["?"])]
    assert scores[0] == 1.0
    expected = {"exact_match": np.mean([one == 1 for one in scores]), "f1": np.mean(scores)}
    expected |= {"extracted": 1.0, "problems": 3}
    assert found["generation"]["g"] == pytest.approx(expected)


def test_prompts_of_a_template_with_a_clock_are_the_same_on_every_day(tmp_path):
    """Llama 3.2's template writes the date; a run resumed tomorrow has to find the same problems."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    path = write_jsonl(tmp_path / "q.jsonl", [{"q": "1+1?", "a": "2"}])
    asked = GenerationTaskOptions(path=str(path), prompt="{q}", answer="{a}")
    (problem,) = read_problems("generation.g", asked, tokenizer, 2048).asked
    assert tokenizer.decode(problem.prompt) == (
        "26 Jul 2024<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("kind", ["tasks", "generation"])
def test_a_model_without_chat_template_is_named(directory, tmp_path, capsys, monkeypatch, kind):
    base = tmp_path / "base"
    shutil.copytree(directory, base)
    (base / "chat_template.jinja").unlink()
    monkeypatch.setattr("train.commands.evaluate.from_hf", None)  # no weight is read before
    task = {"path": tmp_path / "q.jsonl", "prompt": "{q}", "answer": "{a}"}
    write_jsonl(task["path"], [{"q": "1+1?", "a": "2"}, {"q": "1+2?", "a": "3"}])
    task |= {"choices": 2} if kind == "tasks" else {}
    settings = {"model": base, "output": tmp_path / "o.json"}
    given = settings | {f"{kind}.g.{name}": value for name, value in task.items()}
    assert main(["eval", *flags(given)]) == 2
    message = capsys.readouterr().err
    assert f"error: {kind}.g.chat_template is true, but the model's tokenizer has none" in message


@pytest.mark.parametrize("letters", [False, True])
def test_listed_choices(directory, theirs, tmp_path, letters):
    """acc and acc_norm as lm-evaluation-harness defines them, with uneven numbers of choices."""
    path = write_jsonl(tmp_path / "q.jsonl", QUESTIONS * 2)
    task = {"path": str(path), "prompt": "{q}", "answer": "{key}", "choices_field": "choices"}
    task |= {"chat_template": False, "letters": letters}
    found = evaluate(directory, tmp_path, {"tasks": {"c": task}, "batch_size": 4})["tasks"]["c"]
    tokenizer, hits, normed = make_tokenizer(), [], []
    for question in QUESTIONS:
        texts = question["choices"]["text"]
        if letters:
            texts = ["A", "B", "C"][: len(texts)]
        scores = []
        for text in texts:
            prompt, answer = (tokenizer(part)["input_ids"] for part in (question["q"], f" {text}"))
            with torch.no_grad():
                logits = theirs(torch.tensor([prompt + answer])).logits[0].double()
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            scores.append(float(logps.gather(1, torch.tensor(answer)[:, None]).sum()))
        right = question["choices"]["label"].index(question["key"])
        hits.append(np.argmax(scores) == right)
        normed.append(np.argmax(np.array(scores) / [len(t) for t in texts]) == right)
    assert found["acc"] == pytest.approx(np.mean(hits))
    assert found["acc_norm"] == pytest.approx(np.mean(normed))
    assert found["questions"] == 6


@pytest.mark.parametrize("answer", ["B", "1"])
def test_answers_by_letter_and_number(tmp_path, answer):
    record = {"q": "?", "choices": ["zero", "one"], "key": answer}
    path = write_jsonl(tmp_path / "q.jsonl", [record])
    task = TaskOptions(path=str(path), prompt="{q}", answer="{key}", choices_field="choices")
    tokenizer = make_tokenizer()
    (question,), _ = read_questions("tasks.c", task, tokenizer, 2048)
    assert tokenizer.decode(question.answers[0]) == "one"


def test_hub_data_sets_are_scored_on_their_test_split(monkeypatch):
    """TRL's dataset_test_split; what else there is has to be asked for, and never is the default."""
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{"text": "1 is", "a": "2"}, {"text": "2 is", "a": "3"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokenizer, task = make_tokenizer(), {"prompt": "{text}", "answer": "{a}"}
    for split in ({}, {"split": "validation"}):
        read_questions(
            "tasks.c", TaskOptions(path="c", **split, **task, choices=2), tokenizer, 2048
        )
        read_problems(
            "generation.g", GenerationTaskOptions(path="g", **split, **task), tokenizer, 2048
        )
        read_texts("texts.t", TextOptions(path="t", **split), tokenizer, 2048)
    assert asked == [(name, split) for split in ("test", "validation") for name in "cgt"]


def test_refusals(tmp_path):
    record = {"q": "?", "choices": ["zero", "one"], "key": "F", "text": 3}
    path = str(write_jsonl(tmp_path / "q.jsonl", [record]))
    task = {"path": path, "prompt": "{q}", "answer": "{key}"}
    with pytest.raises(UserError, match="names none of its 2 choices"):
        read_questions(
            "tasks.c", TaskOptions(**task, choices_field="choices"), make_tokenizer(), 2048
        )
    with pytest.raises(UserError, match=r"tasks\.c\.choices_field"):
        read_questions("tasks.c", TaskOptions(**task, choices_field="none"), make_tokenizer(), 2048)
    with pytest.raises(UserError, match=r"tasks\.c\.letters"):
        read_questions("tasks.c", TaskOptions(**task, letters=True), make_tokenizer(), 2048)
    asked = {"path": path, "prompt": "{q}"}
    with pytest.raises(UserError, match=r"generation\.g has answer None and answers_field None"):
        read_problems("generation.g", GenerationTaskOptions(**asked), make_tokenizer(), 2048)
    with pytest.raises(UserError, match=r"generation\.g\.answers_field: 'text' of .* is 3, not"):
        read_problems(
            "generation.g",
            GenerationTaskOptions(**asked, answers_field="text"),
            make_tokenizer(),
            2048,
        )
    with pytest.raises(UserError, match=r"texts\.t\.stride"):
        read_texts("texts.t", TextOptions(path=path, stride=2000), make_tokenizer(), 2048)
    with pytest.raises(UserError, match=r"texts\.t\.field"):
        read_texts("texts.t", TextOptions(path=path), make_tokenizer(), 2048)


def test_what_is_longer_than_the_model_reaches_is_refused(tmp_path):
    """As for texts and `generate`: beyond, rotary positions are extrapolated."""
    records = [{"q": "?" * size, "a": "1" * size} for size in (1, 5, 7)]
    path = str(write_jsonl(tmp_path / "q.jsonl", records))
    task = {"path": path, "prompt": "{q}", "answer": "{a}", "chat_template": False}
    written = GenerationTaskOptions(**task, max_new_tokens=4)
    message = r"g\.max_new_tokens 4: 2 of 3 .* 8 positions.* q\.jsonl line 3, 11 tokens with"
    with pytest.raises(UserError, match=message):
        read_problems("generation.g", written, make_tokenizer(), 8)
    assert len(read_problems("generation.g", written, make_tokenizer(), 11).asked) == 3
    path = write_jsonl(tmp_path / "c.jsonl", [{"q": "??", "a": "1"}, {"q": "?", "a": "23456"}])
    choice = TaskOptions(**(task | {"path": str(path)}), choices=2)
    with pytest.raises(UserError, match=r"tasks\.c: 1 of 2 .* 7 positions.* line 1, 8 tokens with"):
        read_questions("tasks.c", choice, make_tokenizer(), 7)  # one space and five digits
    assert len(read_questions("tasks.c", choice, make_tokenizer(), 8)[0]) == 2
