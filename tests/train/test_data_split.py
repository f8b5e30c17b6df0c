import datasets
import pytest
from rich.console import Console

from tests.train.tiny_runs import make_tokenizer, write_jsonl
from train.config import DataOptions, UserError
from train.data import DataError, split_by_prompt, tokenize_preference
from train.inputs.records import load_data


def pairs(count):
    return [
        {"prompt": f"q{number % count}", "chosen": f"{number} a", "rejected": "b"}
        for number in range(2 * count)
    ]


def test_a_prompt_is_on_one_side_only():
    records = pairs(500)
    train, held_out = split_by_prompt(records, 0.1, seed=0)
    assert sorted(map(str, train + held_out)) == sorted(map(str, records))
    prompts = {record["prompt"] for record in held_out}
    assert not prompts & {record["prompt"] for record in train}
    # Binomial with n = 500: four standard deviations around a tenth.
    assert abs(len(prompts) - 50) < 4 * (500 * 0.1 * 0.9) ** 0.5


def test_the_side_depends_on_prompt_and_seed_alone():
    records = pairs(300)
    held_out = split_by_prompt(records, 0.2, seed=1)[1]
    again = split_by_prompt(records[::-1][100:], 0.2, seed=1)[1]
    assert {str(record) for record in again} <= {str(record) for record in held_out}
    assert again
    assert split_by_prompt(records, 0.2, seed=2)[1] != held_out


def test_a_prompt_stays_held_out_across_formats_and_stages():
    as_messages = [
        {"prompt": [{"role": "user", "content": f"Add.\n\n{n}"}], "chosen": "a", "rejected": "b"}
        for n in range(200)
    ]
    as_instructions = [{"instruction": "Add.", "input": f"{n}", "output": "a"} for n in range(200)]
    as_strings = [{"prompt": f"Add.\n\n{n}", "completion": "a"} for n in range(200)]
    sides = []
    for records in (as_messages, as_instructions, as_strings):
        held_out = split_by_prompt(records, 0.3, seed=0)[1]
        sides.append([record in held_out for record in records])
    assert sides[0] == sides[1] == sides[2]


def test_on_policy_prompts_need_no_answers():
    questions = [{"question": f"q{n}"} for n in range(200)]
    as_instructions = [{"instruction": f"q{n}"} for n in range(200)]
    beside = [{"prompt": f"q{n}", "question": "?", "answer": "a"} for n in range(200)]
    sides = []
    for records in (questions, as_instructions, beside):
        held_out = split_by_prompt(records, 0.3, seed=0)[1]
        sides.append([record in held_out for record in records])
    assert sides[0] == sides[1] == sides[2]
    assert any(sides[0])


def test_the_question_of_marked_turns_counts_where_the_answers_begin_alike():
    turns = "\n\nHuman: q{}\n\nAssistant:"
    records = [
        {
            "chosen": turns.format(n % 100) + f" I {n}",
            "rejected": turns.format(n % 100) + f" I -{n}",
        }
        for n in range(400)
    ]
    train, held_out = split_by_prompt(records, 0.2, seed=0)
    asked = [{record["chosen"].split(" I ")[0] for record in side} for side in (train, held_out)]
    assert asked[1]
    assert not asked[0] & asked[1]


def test_records_without_a_lesson_stay_for_the_count():
    record = {"prompt": "q", "chosen": "same", "rejected": "same"}
    assert record in split_by_prompt([*pairs(20), record], 0.5, seed=0)[0]


def test_bad_fractions_and_empty_sides_are_refused():
    assert split_by_prompt(pairs(2), 0.0) == (pairs(2), [])
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"eval_fraction must be in \[0, 1\), got"):
            split_by_prompt(pairs(2), fraction)
    with pytest.raises(DataError, match=r"leaves none for evaluation\. Use another fraction"):
        split_by_prompt(pairs(3), 1e-9)
    with pytest.raises(DataError, match="leaves none for training"):
        split_by_prompt(pairs(3), 1 - 1e-9)


def load(**options):
    given = DataOptions(**options)
    return load_data(given, tokenize_preference, make_tokenizer(), Console(quiet=True))


@pytest.fixture
def hub(monkeypatch):
    """Data sets that hold pairs, and a list of the names and splits that were asked for."""
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list(pairs(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("options", "split"),
    [({}, "test"), ({"eval_split": "train[95%:]", "split": "train[:95%]"}, "train[95%:]")],
)
def test_evaluation_has_a_split_of_its_own(hub, options, split):
    train, held_out = load(path="a/b:c", eval_path="a/b:c", **options)
    assert len(train) == len(held_out) == 6
    assert hub == [("a/b", "c", options.get("split", "train")), ("a/b", "c", split)]


@pytest.mark.parametrize(
    "options",
    [
        {"eval_split": "train"},
        {"eval_split": "train[:5%]"},
        {"eval_split": "test+train"},
        {"split": "test"},
        {"path": "b", "mix": {"a": 0.5}, "split": "test[5%:]"},
    ],
)
def test_a_split_that_is_trained_on_is_refused(hub, options):
    with pytest.raises(UserError, match=r"data\.eval_path: the split .* of 'a' is trained on, and"):
        load(**({"path": "a", "eval_path": "a"} | options))
    assert hub == []


@pytest.mark.parametrize("mixed", [True, False])
def test_a_file_that_is_trained_on_is_refused(tmp_path, monkeypatch, mixed):
    file, other = (write_jsonl(tmp_path / name, pairs(2)) for name in ("a.jsonl", "b.jsonl"))
    monkeypatch.chdir(tmp_path)
    options = {"path": str(other), "mix": {str(file): 1.0}} if mixed else {"path": str(file)}
    with pytest.raises(
        UserError, match=r"data\.eval_path: .*a\.jsonl' is trained on; give another"
    ):
        load(**options, eval_path="a.jsonl", eval_split="test")
    assert load(path=str(other), eval_path="a.jsonl")[1] is not None
