"""Hold out part of a data set so that no prompt is on both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from train.data.formats import DataError
from train.data.records import (
    Message,
    UnusableRecord,
    has,
    normalise_preference,
    normalise_prompt,
    normalise_sft,
)

R = TypeVar("R", bound=Mapping[str, Any])


def split_by_prompt(
    records: Sequence[R], eval_fraction: float, seed: int = 0
) -> tuple[list[R], list[R]]:
    """Split by a hash of the prompt's content.

    Whether a prompt is held out depends on its text, `eval_fraction` and `seed` alone: not on the
    order of records, not on what else the set holds, and not on the format, so that a prompt held
    out of SFT as `{instruction, input, output}` is held out of DPO as messages too.

    `eval_fraction` is a share of the prompts, in [0, 1); the share of records varies around it, as
    prompts are few or repeated.

    Returns:
      `(train, eval)`, both in the order of `records`. Records that cannot be trained on stay in
      `train`, where tokenising counts them.

    Raises:
      DataError: When a record is malformed, or one side would be empty.
      ValueError: When `eval_fraction` is out of range.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction must be in [0, 1), got {eval_fraction}.")
    if eval_fraction == 0:
        return list(records), []
    train: list[R] = []
    held_out: list[R] = []
    for record in records:
        (held_out if _draw(record, seed) < eval_fraction else train).append(record)
    if not train or not held_out:
        side = "training" if not train else "evaluation"
        raise DataError(
            f"Holding out {eval_fraction:g} of the prompts of {len(records)} records leaves none "
            f"for {side}. Use another fraction, another seed or more data."
        )
    return train, held_out


def _draw(record: Mapping[str, Any], seed: int) -> float:
    """A number in [0, 1] from the prompt's roles and contents."""
    try:
        messages = _prompt_messages(record)
    except UnusableRecord:
        return 1.0
    content = [[message["role"], message["content"]] for message in messages]
    text = json.dumps([seed, content], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _prompt_messages(record: Mapping[str, Any]) -> list[Message]:
    """The prompt of a record of any format, as messages; a string counts as one user turn.

    It tells whether two records ask the same, across formats and training stages. The common
    beginning of two answers may reach beyond the prompt; where turns are marked as in HH-RLHF, it is
    cut off where the last answer begins. Raises `DataError` for a record in none of the formats, and
    `UnusableRecord` for one that cannot be trained on.
    """
    if has(record, "chosen") or has(record, "rejected"):
        prompt = normalise_preference(record).prompt
        if isinstance(prompt, str) and not has(record, "prompt") and _LAST_TURN in prompt:
            prompt = prompt[: prompt.rindex(_LAST_TURN) + len(_LAST_TURN)]
    elif has(record, "completion") or _answered(record):
        prompt = normalise_sft(record).prompt
    else:
        prompt = normalise_prompt(record)
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


_LAST_TURN = "\n\nAssistant:"


def _answered(record: Mapping[str, Any]) -> bool:
    """Whether a record without prompt and completion holds an answer; on-policy data need none."""
    return not has(record, "prompt") and (
        has(record, "messages")
        or (has(record, "instruction") and has(record, "output"))
        or (has(record, "question") and has(record, "answer"))
    )
