"""Bring the data set formats in use to two shapes: a preference, and an example for SFT.

Preferences (the fields of TRL, and instruction data as LLaMA-Factory has it):

- `prompt`, `chosen`, `rejected`: strings, or lists of messages `{"role", "content"}`, or one of
  each; answers that repeat the prompt's messages lose them;
- `chosen`, `rejected` alone: the prompt is their longest common beginning, of characters for
  strings and of messages for conversations;
- `instruction`, `input` (optional), `chosen`, `rejected`.

Examples: `prompt`, `completion`; `messages`, of which the last is learned; `instruction`, `input`
(optional), `output`; `question`, `answer`.

Unpaired answers, for KTO: an example in any of these formats with `label`, true where the answer is
desirable. A preference counts as two of them.

Prompts alone, for on-policy training: `prompt`, or any record above, whose answers are ignored.

Instructions and questions become a conversation of one user turn. Messages keep every key they
have, because chat templates may use more than role and content. Other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.data.formats import DataError, where_of

Message = dict[str, Any]
Text = str | list[Message]

PREFERENCE_FORMATS = (
    "{prompt, chosen, rejected}, {chosen, rejected} or {instruction, input, chosen, rejected}"
)
UNPAIRED_FORMATS = "{prompt, completion, label} or pairs of {prompt, chosen, rejected}"
PROMPT_FORMATS = "{prompt}, or a preference or an example with one"
SFT_FORMATS = "{prompt, completion}, {messages}, {instruction, input, output} or {question, answer}"


class UnusableRecord(Exception):
    """A sound record that cannot be trained on; the message is the reason, to be counted."""


@dataclass(frozen=True)
class Preference:
    """A prompt with a preferred and a rejected answer.

    All are texts; or the prompt is the messages of a conversation up to the answer, and each answer
    one assistant message.
    """

    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Example:
    """A prompt with the completion to learn, in the shapes of `Preference`."""

    prompt: Text
    completion: Text


def normalise_preference(record: Mapping[str, Any]) -> Preference:
    r"""Read a preference in any of this module's formats.

    Raises:
      DataError: When a field is missing, empty or of the wrong type.
      UnusableRecord: When the answers are the same, or differ before the last message.

    Example:
      >>> record = {"instruction": "Add", "input": "1 1", "chosen": "2", "rejected": "3"}
      >>> normalise_preference(record).prompt
      [{'role': 'user', 'content': 'Add\n\n1 1'}]
    """
    where = where_of(record)
    chosen = _field(record, "chosen", PREFERENCE_FORMATS)
    rejected = _field(record, "rejected", PREFERENCE_FORMATS)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"{where}: fields 'chosen' and 'rejected' must both be strings or both be messages."
        )
    if chosen == rejected:
        raise UnusableRecord("chosen and rejected are the same")
    if has(record, "prompt"):
        prompt = _field(record, "prompt", PREFERENCE_FORMATS)
    elif has(record, "instruction"):
        prompt = _instruction(record, PREFERENCE_FORMATS)
    else:
        prompt, chosen, rejected = _split_common_prompt(chosen, rejected, where)
    prompt, (chosen, rejected) = _match_shapes(
        prompt, {"chosen": chosen, "rejected": rejected}, where
    )
    return Preference(prompt, chosen, rejected)


def normalise_sft(record: Mapping[str, Any]) -> Example:
    """Read an SFT example in any of this module's formats.

    Raises:
      DataError: When a field is missing, empty or of the wrong type.
      UnusableRecord: When the completion holds more than one message.

    Example:
      >>> normalise_sft({"prompt": "1+1=", "completion": "2"})
      Example(prompt='1+1=', completion='2')
    """
    where = where_of(record)
    if has(record, "completion"):
        prompt, name = _field(record, "prompt", SFT_FORMATS), "completion"
    elif has(record, "messages"):
        messages = _field(record, "messages", SFT_FORMATS)
        if isinstance(messages, str) or len(messages) < 2:
            raise DataError(f"{where}: field 'messages' needs a prompt and an answer.")
        prompt, answer = messages[:-1], messages[-1:]
        return Example(prompt, _one_answer(answer, "messages", where))
    elif has(record, "instruction"):
        prompt, name = _instruction(record, SFT_FORMATS), "output"
    elif has(record, "question"):
        prompt, name = [_message("user", _string(record, "question", SFT_FORMATS))], "answer"
    else:
        raise DataError(f"{where}: found {_found(record)}. Expected {SFT_FORMATS}.")
    answer = _field(record, name, SFT_FORMATS)
    prompt, (completion,) = _match_shapes(prompt, {name: answer}, where)
    return Example(prompt, completion)


@dataclass(frozen=True)
class Labelled(Example):
    """An example that says whether its completion is desirable."""

    label: bool


def normalise_unpaired(record: Mapping[str, Any]) -> list[Labelled]:
    """Read a labelled answer, or both answers of a preference as TRL does, the chosen one first.

    A labelled answer has a format of `normalise_sft` and `label` (true, false, 1 or 0).

    Raises:
      DataError: When a field is missing, empty or of the wrong type.
      UnusableRecord: When the record cannot be trained on.

    Example:
      >>> [one] = normalise_unpaired({"prompt": "1+1=", "completion": "2", "label": True})
      >>> one.completion, one.label
      ('2', True)
    """
    if has(record, "chosen") or has(record, "rejected"):
        pair = normalise_preference(record)
        return [
            Labelled(pair.prompt, pair.chosen, True),
            Labelled(pair.prompt, pair.rejected, False),
        ]
    where, label = where_of(record), record.get("label")
    if label is None:
        raise DataError(
            f"{where}: field 'label' is missing; found {_found(record)}. Expected {UNPAIRED_FORMATS}."
        )
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise DataError(
            f"{where}: field 'label' must be true (desirable) or false, found {label!r}."
        )
    example = normalise_sft(record)
    return [Labelled(example.prompt, example.completion, bool(label))]


def normalise_prompt(record: Mapping[str, Any]) -> Text:
    r"""The prompt of a record in any of this module's formats: text, or messages.

    Raises:
      DataError: When there is no prompt, or it is neither text nor messages.
      UnusableRecord: When the prompt would have to be found in answers that are the same.

    Example:
      >>> normalise_prompt({"prompt": "1+1="}), normalise_prompt({"question": "1+1?"})
      ('1+1=', [{'role': 'user', 'content': '1+1?'}])
    """
    if has(record, "prompt"):
        return _field(record, "prompt", PROMPT_FORMATS)
    if has(record, "instruction"):
        return _instruction(record, PROMPT_FORMATS)
    if has(record, "question"):
        return [_message("user", _string(record, "question", PROMPT_FORMATS))]
    if has(record, "chosen") or has(record, "rejected"):
        return normalise_preference(record).prompt
    if has(record, "messages"):
        return normalise_sft(record).prompt
    where = where_of(record)
    raise DataError(f"{where}: found {_found(record)}. Expected {PROMPT_FORMATS}.")


def prompt_of(record: Mapping[str, Any]) -> Text:
    """A record's field `prompt`; raises `DataError` where it is neither text nor messages."""
    return _field(record, "prompt", "text or a list of messages")


def has(record: Mapping[str, Any], name: str) -> bool:
    """Whether a field is there; tables hold None for what a row lacks."""
    return record.get(name) is not None


def _found(record: Mapping[str, Any]) -> str:
    """The fields of a record, for messages."""
    names = ", ".join(repr(name) for name in record if has(record, name))
    return f"the fields {names}" if names else "no fields"


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _field(record: Mapping[str, Any], name: str, formats: str) -> Text:
    """A field that is text or messages, checked."""
    where = where_of(record)
    if not has(record, name):
        raise DataError(
            f"{where}: field {name!r} is missing; found {_found(record)}. Expected {formats}."
        )
    value = record[name]
    if isinstance(value, str):
        _check_characters(value, name, where)
        _check_not_empty(value, name, where)
        return value
    if not isinstance(value, list):
        raise DataError(
            f"{where}: field {name!r} must be a string or a list of messages, "
            f"found {type(value).__name__}."
        )
    if not value:
        raise DataError(f"{where}: field {name!r} is an empty list of messages.")
    for number, message in enumerate(value):
        _check_message(message, f"{name}[{number}]", where)
    return value


def _string(record: Mapping[str, Any], name: str, formats: str) -> str:
    """A field that is text, checked."""
    value = _field(record, name, formats)
    if not isinstance(value, str):
        raise DataError(f"{where_of(record)}: field {name!r} must be a string, found messages.")
    return value


def _check_characters(text: str, name: str, where: str) -> None:
    """Raises `DataError` for half a character: JSON may hold it, but no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {name!r} holds half a character, {text[error.start]!a} at position "
            f"{error.start}. Write the whole one or remove the record."
        ) from None


def _check_not_empty(text: str, name: str, where: str) -> None:
    """Raises `DataError` for a text without a visible character."""
    if not text.strip():
        raise DataError(f"{where}: field {name!r} is empty. Give it a text or remove the record.")


def _check_message(message: Any, name: str, where: str) -> None:
    """Raises `DataError` for anything but a role and a content that can be tokenised."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        found = sorted(message) if isinstance(message, Mapping) else type(message).__name__
        raise DataError(
            f"{where}: {name} must be a message with 'role' and 'content', found {found}."
        )
    for key in ("role", "content"):
        if not isinstance(message[key], str):
            raise DataError(
                f"{where}: {name}[{key!r}] must be a string, found {type(message[key]).__name__}."
            )
        _check_characters(message[key], f"{name}[{key!r}]", where)
    # Only a system turn may be empty: some data sets write one to say that there is none.
    if message["role"] != "system":
        _check_not_empty(message["content"], name, where)


def _instruction(record: Mapping[str, Any], formats: str) -> list[Message]:
    """The user turn of instruction data."""
    where = where_of(record)
    for name in ("history", "system"):
        if record.get(name):
            raise DataError(
                f"{where}: field {name!r} is not supported next to 'instruction'. Write the "
                "conversation as messages."
            )
    instruction, context = _string(record, "instruction", formats), record.get("input") or ""
    if not isinstance(context, str):
        raise DataError(f"{where}: field 'input' must be a string, found {type(context).__name__}.")
    return [_message("user", f"{instruction}\n\n{context}" if context.strip() else instruction)]


def _split_common_prompt(chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
    """The longest common beginning of two answers, and the rest of each."""
    length = common_length(chosen, rejected)
    # As in TRL, the space before the first word that differs belongs to the answers.
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1
    if not length:
        raise DataError(
            f"{where}: field 'prompt' is missing, and 'chosen' and 'rejected' have no common "
            "beginning to take as the prompt."
        )
    prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, str):
            _check_not_empty(answer, name, where)
        elif not answer:
            raise DataError(f"{where}: field {name!r} is empty after the common prompt.")
    return prompt, chosen, rejected


def common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many entries two sequences begin with in common."""
    pairs = enumerate(zip(left, right, strict=False))
    shorter = min(len(left), len(right))
    return next((place for place, (one, other) in pairs if one != other), shorter)


def _match_shapes(prompt: Text, answers: dict[str, Text], where: str) -> tuple[Text, list[Text]]:
    """Make prompt and answers all strings, or all messages with one answer each."""
    if isinstance(prompt, str):
        if all(isinstance(answer, str) for answer in answers.values()):
            return prompt, list(answers.values())
        prompt = [_message("user", prompt)]
    return prompt, [
        [_message("assistant", answer)]
        if isinstance(answer, str)
        else _one_answer(_without_prompt(answer, prompt), name, where)
        for name, answer in answers.items()
    ]


def _without_prompt(answer: list[Message], prompt: list[Message]) -> list[Message]:
    """An answer without the prompt that some data sets (UltraFeedback) repeat at its start."""
    start = [(message["role"], message["content"]) for message in answer[: len(prompt)]]
    if start == [(message["role"], message["content"]) for message in prompt]:
        return answer[len(prompt) :]
    return answer


def _one_answer(answer: list[Message], name: str, where: str) -> list[Message]:
    """Check that what is left is the last turn of the assistant."""
    if not answer:
        raise DataError(f"{where}: field {name!r} is empty after the prompt.")
    if len(answer) > 1:
        raise UnusableRecord("the answer is more than one message")
    if answer[0]["role"] != "assistant":
        raise DataError(
            f"{where}: field {name!r} must end with an assistant message, "
            f"found role {answer[0]['role']!r}."
        )
    return answer
