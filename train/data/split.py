"""Hold out part of a data set so that no prompt is on both sides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from train.data.formats import DataError
from train.data.records import UnusableRecord, prompt_messages

R = TypeVar("R", bound=Mapping[str, Any])


def split_by_prompt(
    records: Sequence[R], eval_fraction: float, seed: int = 0
) -> tuple[list[R], list[R]]:
    """Split by a hash of the prompt's content.

    Whether a prompt is held out depends on its text, `eval_fraction` and `seed` alone: not on the
    order of records, not on what else the set holds, and not on the format, so that a prompt held
    out of SFT as `{instruction, input, output}` is held out of DPO as messages too.

    Args:
      records: In the formats of `train.data.records`.
      eval_fraction: Share of the prompts to hold out, in [0, 1). The share of records that results
        varies around it, as prompts are few or repeated.
      seed: Another seed holds out other prompts.

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
        messages = prompt_messages(record)
    except UnusableRecord:
        return 1.0
    content = [[message["role"], message["content"]] for message in messages]
    text = json.dumps([seed, content], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
