r"""From text and messages to token ids: chat templates, end tokens and the prompt's boundary.

The rules, for every completion:

- it ends with exactly one end token: the one its chat template closes a turn with, or the
  tokeniser's EOS. What templates write behind it (`<|im_end|>\n`) is never generated, because
  generation has stopped, so it is not trained on either; TRL keeps it;
- it starts where the tokens of the prompt and those of prompt and answer together part. Usually
  that is the end of the prompt; where tokens merge across it, the start moves back, as in TRL;
- BOS stands once at the start of the prompt when the tokeniser or the template puts it there, and
  nowhere inside a completion;
- a chat template that writes today's date (Llama 3.2) gets a fixed one, so that the tokens, and
  with them resumed runs and cached log-probabilities, are the same on every day.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from train.data.formats import DataError
from train.data.records import Text, UnusableRecord, common_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat"]

TODAY = datetime(2024, 7, 26)
"""Today in chat templates: what Llama 3.1 and 3.2 write when there is no clock."""

# Llama's templates take this variable; others ask the function `strftime_now` whatever is given.
# transformers lets no function be passed in its place, but a macro of that name hides it. The line
# break belongs to the macro: blocks lose the one behind them.
_DATE_STRING = TODAY.strftime("%d %b %Y")
_CODES = [f"%{letter}" for letter in ("-d", "-m", *"aAbBdeFHIjmMpSyY")]
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({code!r}, {TODAY.strftime(code)!r})" for code in _CODES)
    + " }}{% endmacro %}\n"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt, at least one, and of its answers, each with its end token.

    `moved` says whether the prompt lost tokens to the answers at the boundary.
    """

    prompt: list[int]
    answers: list[list[int]]
    moved: bool


@dataclass(frozen=True)
class Row:
    """A prompt with its answers, all strings or all messages, and where the record was read.

    Rows of unpaired answers say whether the answer is desirable; rows of prompts alone bring the
    record along, of which a reward function may want more.
    """

    prompt: Text
    answers: Sequence[Text]
    where: str
    label: bool | None = None
    record: Mapping[str, Any] | None = None


class Encoder:
    """Turns rows into token ids with one tokeniser.

    The template `"auto"` renders conversations with the chat template and takes strings as they are,
    which is what TRL does; `"chat"` also makes a user turn of a string prompt and an assistant turn
    of a string answer. Raises `DataError` when the tokeniser has no EOS token, or `template` is
    unknown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template = "auto"):
        if template not in ("auto", "chat"):
            raise DataError(f"template must be 'auto' or 'chat', got {template!r}.")
        if tokenizer.eos_token_id is None:
            raise DataError("The tokenizer has no EOS token, so completions cannot end.")
        # transformers types ids as int, str or lists of either; these are plain ids.
        self._tokenizer: Any = tokenizer
        self.template = template
        self.eos_id: int = self._tokenizer.eos_token_id
        self.bos_id: int | None = self._tokenizer.bos_token_id
        pad_id = self._tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad_id is None else pad_id

    def encode(self, rows: Sequence[Row]) -> list[Encoded | UnusableRecord]:
        """Token ids of every row, or the reason why it has none. Rows may have no answers.

        Raises `DataError` when a conversation meets no chat template, or one that refuses it.
        """
        texts: list[str] = []
        conversations = []
        for row in rows:
            prompt, answers = self._as_template_wants(row)
            conversations.append(not isinstance(prompt, str))
            texts += self._render(prompt, answers, row.where)
        if not rows:
            return []
        # One call: fast tokenisers spread a batch over the cores.
        ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        encoded, start = [], 0
        for row, conversation in zip(rows, conversations, strict=True):
            stop = start + 1 + len(row.answers)
            encoded.append(self._encoded(ids[start], ids[start + 1 : stop], conversation))
            start = stop
        return encoded

    def whole_texts(self, row: Row) -> list[str]:
        """The text of prompt and answer for every answer of a row; raises what `encode` raises."""
        prompt, answers = self._as_template_wants(row)
        return self._render(prompt, answers, row.where)[1:]

    def _as_template_wants(self, row: Row) -> tuple[Text, Sequence[Text]]:
        if self.template == "chat" and isinstance(row.prompt, str):
            prompt = [{"role": "user", "content": row.prompt}]
            return prompt, [[{"role": "assistant", "content": answer}] for answer in row.answers]
        return row.prompt, row.answers

    def _render(self, prompt: Text, answers: Sequence[Text], where: str) -> list[str]:
        """The text of the prompt, then that of prompt and answer for every answer."""
        if isinstance(prompt, str):
            return [prompt, *(prompt + str(answer) for answer in answers)]
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{where}: the record is a conversation, but the tokenizer has no chat template. "
                "Use a tokenizer that has one, or write prompt and answer as strings."
            )
        try:
            return [
                self._apply(prompt, add_generation_prompt=True),
                *(self._apply([*prompt, *answer]) for answer in answers),
            ]
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template refuses the messages: {error}.") from error

    def _apply(self, messages: Sequence[Any], *, add_generation_prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            messages,
            chat_template=self._chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=_DATE_STRING,
        )

    @cached_property
    def _chat_template(self) -> str:
        template = self._tokenizer.get_chat_template()
        return _CLOCK + template if "strftime_now" in template else template

    def _encoded(
        self, prompt: list[int], wholes: list[list[int]], conversation: bool
    ) -> Encoded | UnusableRecord:
        """Prompt and answers from the tokens of the prompt and of prompt and answer together."""
        boundary = min((common_length(prompt, whole) for whole in wholes), default=len(prompt))
        ends = self._turn_ends if conversation else {self.eos_id}
        answers = [self._finished(whole[boundary:], ends) for whole in wholes]
        moved = boundary < len(prompt)
        prompt = prompt[:boundary]
        if not conversation and prompt[:1] != self._plain_start:
            prompt = self._plain_start + prompt
        if not prompt:
            return UnusableRecord("the prompt has no tokens")
        for answer in answers:
            if answer[-1] in answer[:-1] or self.eos_id in answer[:-1]:
                return UnusableRecord("the completion contains the end token")
            if self.bos_id is not None and self.bos_id in answer[:-1]:
                return UnusableRecord("the completion contains the BOS token")
        return Encoded(prompt, answers, moved)

    def _finished(self, answer: list[int], ends: set[int]) -> list[int]:
        """The answer up to the token that closes it, or with EOS appended when none does."""
        stop = len(answer)
        while stop and self._is_blank(answer[stop - 1]):
            stop -= 1
        if stop and answer[stop - 1] in ends:
            return answer[:stop]
        return [*answer, self.eos_id]

    def _is_blank(self, token: int) -> bool:
        return token not in self._turn_ends and not self._tokenizer.decode([token]).strip()

    @cached_property
    def _turn_ends(self) -> set[int]:
        """Special tokens: a template closes a turn with one of them, if with anything."""
        added = self._tokenizer.added_tokens_decoder
        return {token for token, entry in added.items() if entry.special} | {self.eos_id}

    @cached_property
    def _plain_start(self) -> list[int]:
        """BOS, where the tokeniser starts plain text with it."""
        start = self._tokenizer("").input_ids[:1]
        return start if self.bos_id is not None and start == [self.bos_id] else []
