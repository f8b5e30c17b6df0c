import pytest
from trl.data_utils import extract_prompt

from train.data import (
    DataError,
    Preference,
    Record,
    UnusableRecord,
    normalise_preference,
    normalise_sft,
)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


ASK, YES, NO = user("Is it?"), bot("Yes."), bot("No.")
MESSAGES = Preference([ASK], [YES], [NO])


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a ", "chosen": "b", "rejected": "c"}, Preference("a ", "b", "c")),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, MESSAGES),
        ({"prompt": [ASK], "chosen": "Yes.", "rejected": "No."}, MESSAGES),
        ({"prompt": "Is it?", "chosen": [YES], "rejected": [NO]}, MESSAGES),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, MESSAGES),
        # UltraFeedback: the prompt as a string, and again in both conversations.
        ({"prompt": "Is it?", "chosen": [ASK, YES], "rejected": [ASK, NO]}, MESSAGES),
        ({"instruction": "Is it?", "chosen": "Yes.", "rejected": "No."}, MESSAGES),
        ({"instruction": "Is it?", "input": None, "chosen": "Yes.", "rejected": "No."}, MESSAGES),
        (
            {"instruction": "Add.", "input": "1 1", "chosen": "2", "rejected": "3", "id": 7},
            Preference([user("Add.\n\n1 1")], [bot("2")], [bot("3")]),
        ),
        (
            {
                "prompt": [{"role": "system", "content": ""}, ASK],
                "chosen": [{**YES, "reasoning_content": "hm"}],
                "rejected": [NO],
            },
            Preference(
                [{"role": "system", "content": ""}, ASK],
                [{**YES, "reasoning_content": "hm"}],
                [NO],
            ),
        ),
    ],
)
def test_preference_formats(record, expected):
    assert normalise_preference(record) == expected


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "Q: a\nA: left", "rejected": "Q: a\nA: right"},
        {"chosen": [user("hi"), bot("a"), ASK, YES], "rejected": [user("hi"), bot("a"), ASK, NO]},
    ],
)
def test_implicit_prompts_are_trl_s(record):
    expected = extract_prompt(record)
    pair = normalise_preference(record)
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        expected["prompt"],
        expected["chosen"],
        expected["rejected"],
    )


@pytest.mark.parametrize(
    ("record", "prompt", "completion"),
    [
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": [ASK], "completion": [YES]}, [ASK], [YES]),
        ({"prompt": [ASK], "completion": "Yes."}, [ASK], [YES]),
        ({"messages": [ASK, NO, user("Sure?"), YES]}, [ASK, NO, user("Sure?")], [YES]),
        ({"instruction": "Is it?", "input": "", "output": "Yes."}, [ASK], [YES]),
        ({"instruction": "Is", "input": "it?", "output": "Yes."}, [user("Is\n\nit?")], [YES]),
        ({"question": "Is it?", "answer": "Yes."}, [ASK], [YES]),
    ],
)
def test_sft_formats(record, prompt, completion):
    example = normalise_sft(record)
    assert (example.prompt, example.completion) == (prompt, completion)


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**PAIR, "chosen": ""}, "field 'chosen' is empty. Give it a text or remove the record"),
        ({**PAIR, "rejected": " \n"}, "field 'rejected' is empty"),
        ({**PAIR, "prompt": ""}, "field 'prompt' is empty"),
        ({**PAIR, "chosen": None}, "field 'chosen' is missing; found the fields 'prompt', 'rej"),
        ({"text": "x"}, "field 'chosen' is missing; found the fields 'text'. Expected {prompt, ch"),
        ({}, "field 'chosen' is missing; found no fields"),
        ({**PAIR, "chosen": 3}, "field 'chosen' must be a string or a list of messages, found int"),
        ({**PAIR, "chosen": [YES]}, "'chosen' and 'rejected' must both be strings or both be mess"),
        ({**PAIR, "prompt": []}, "field 'prompt' is an empty list of messages"),
        (
            {**PAIR, "prompt": ["a"]},
            "prompt[0] must be a message with 'role' and 'content', found s",
        ),
        ({**PAIR, "prompt": [{"from": "a"}]}, "'role' and 'content', found ['from']"),
        ({**PAIR, "prompt": [user(["x"])]}, "prompt[0]['content'] must be a string, found list"),
        ({"prompt": [ASK], "chosen": [bot("")], "rejected": [NO]}, "'chosen[0]' is empty"),
        (
            {"prompt": [ASK], "chosen": [user("x")], "rejected": [NO]},
            "end with an assistant messag",
        ),
        (
            {"chosen": [ASK], "rejected": [ASK, NO]},
            "field 'chosen' is empty after the common prompt",
        ),
        ({"chosen": "A: yes", "rejected": "A: yes, it is"}, "field 'chosen' is empty"),
        ({"chosen": "yes", "rejected": "no"}, "have no common beginning to take as the prompt"),
        ({"instruction": "a", "history": [["b", "c"]], **PAIR, "prompt": None}, "'history' is not"),
        (
            {"instruction": "a", "input": 3, **PAIR, "prompt": None},
            "'input' must be a string, found",
        ),
    ],
)
def test_bad_preferences_name_place_and_field(record, message):
    with pytest.raises(DataError) as error:
        normalise_preference(Record(record, "pairs.jsonl line 17"))
    assert str(error.value).startswith("pairs.jsonl line 17: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "found the fields 'prompt'. Expected {prompt, completion}, {messages}"),
        ({"completion": "a"}, "field 'prompt' is missing"),
        ({"prompt": "a", "completion": ""}, "field 'completion' is empty"),
        ({"messages": [YES]}, "field 'messages' needs a prompt and an answer"),
        ({"messages": "a"}, "field 'messages' needs a prompt and an answer"),
        ({"messages": [YES, ASK]}, "'messages' must end with an assistant message, found role 'us"),
        ({"instruction": "a"}, "field 'output' is missing"),
        ({"question": "a", "answer": ""}, "field 'answer' is empty"),
        ({"question": [ASK], "answer": "b"}, "field 'question' must be a string, found messages"),
    ],
)
def test_bad_examples_name_place_and_field(record, message):
    with pytest.raises(DataError) as error:
        normalise_sft(Record(record, "sft.jsonl line 3"))
    assert str(error.value).startswith("sft.jsonl line 3: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"chosen": [ASK, YES, ASK, YES], "rejected": [ASK, NO, ASK, NO]}, "more than one message"),
    ],
)
def test_sound_records_without_a_lesson_are_set_apart(record, reason):
    with pytest.raises(UnusableRecord, match=reason):
        normalise_preference(record)
