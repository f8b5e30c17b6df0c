"""Rewards score sampled answers: a Python function with TRL's signature, or a reward model.

Both are checked before a weight of the policy is read. The function is imported, the records must
have the fields that it takes, and it is called once with empty answers, which a policy may give too.
The model is checked from its configuration and the headers of its files.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import UserError
from train.data.padding import pad_rows, padded_width
from train.data.records import Text
from train.data.templates import Encoder, Row
from train.distributed.batches import own_rows, put_batch, row_devices
from train.distributed.processes import largest_of_all
from train.inputs.model import blamed_on, load_tokenizer
from train.models.reward import RewardModel, last_token_scores, load_reward_model

TRIED = 2  # records that a reward function is tried on

_GIVEN = ("prompts", "completions", "completion_ids")
_NEVER_PASSED = ("prompt", "completion", *_GIVEN)


@dataclass(frozen=True)
class Answers:
    """Sampled answers; every list has one entry for each of them.

    ``prompts`` are texts or messages, as ``records``, which they were read from, have them.
    ``completions`` are decoded without special tokens; ``completion_ids`` include the end token.
    """

    prompts: list[Text]
    completions: list[str]
    completion_ids: list[list[int]]
    records: list[Mapping[str, Any]]

    def messages(self) -> list[Text]:
        """The completions in the shape of their prompts: text, or one assistant message."""
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.completions, strict=True)
        ]


Reward = Callable[[Answers], np.ndarray]
"""Gives finite scores, float64 ``[answers]``, or raises `UserError`. One of several rewards may give
NaN where it does not apply; all together give ``[answers, rewards]``."""


def function_reward(
    name: str, records: Sequence[Mapping[str, Any]], *, optional: bool = False
) -> Reward:
    """A reward function, imported and checked.

    Raises `UserError` where it cannot be imported or takes something that no record has, and when
    called where it gives anything but a finite number, or None if ``optional``, for each answer.
    """
    function = import_function(name)
    fields = {field for record in records for field in record} - set(_NEVER_PASSED)
    taken = _taken(function, name, fields)

    def reward(answers: Answers) -> np.ndarray:
        given = {
            "prompts": answers.prompts,
            "completions": answers.messages(),
            "completion_ids": answers.completion_ids,
            **{field: [record.get(field) for record in answers.records] for field in fields},
        }
        try:
            scores = function(**{key: given[key] for key in taken})
        except Exception as error:  # whatever the user's code raises
            raise UserError(
                f"reward.function {name} raised {type(error).__name__}: {error}"
            ) from error
        return _numbers(scores, len(answers.prompts), f"reward.function {name}", optional)

    return reward


def stack_rewards(rewards: Sequence[Reward]) -> Reward:
    """Rewards side by side: a reward that gives float64 ``[answers, rewards]``."""
    return lambda answers: np.stack([reward(answers) for reward in rewards], axis=1)


def import_function(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; raises `UserError` where there is none."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(f"reward.function must be written module:function, got {name!r}.")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"reward.function: module {module!r} cannot be imported ({type(error).__name__}: {error}). "
            "It is looked for in the current directory and on PYTHONPATH."
        ) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UserError(f"reward.function: module {module!r} has no function {attribute!r}.")
    return found


def _taken(function: Callable[..., Any], name: str, fields: set[str]) -> list[str]:
    """Names of the arguments to pass: all that are known, or those in the signature."""
    known = [*_GIVEN, *sorted(fields)]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # some callables of compiled modules have none
        return known
    missing = [
        one.name
        for one in parameters
        if one.default is one.empty
        and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        and one.name not in known
    ]
    if missing:
        raise UserError(
            f"reward.function {name} takes {', '.join(missing)}, which the records do not have; there "
            f"are {', '.join(known)}."
        )
    if any(one.kind == one.VAR_KEYWORD for one in parameters):
        return known
    names = {one.name for one in parameters}
    return [one for one in known if one in names]


def _numbers(scores: Any, expected: int, what: str, optional: bool = False) -> np.ndarray:
    try:
        given = list(scores)
        found = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{what} must return a number for each answer, got {scores!r:.200}."
        ) from error
    if found.shape != (expected,):
        raise UserError(
            f"{what} must return {expected} numbers, one for each answer, got shape "
            f"{list(found.shape)}."
        )
    skipped = np.array([optional and one is None for one in given], bool)
    wrong = np.flatnonzero(~(np.isfinite(found) | skipped))
    if wrong.size:
        raise UserError(
            f"{what} must return finite numbers, got {found[wrong[0]]} for answer {wrong[0]} of "
            f"{expected}."
        )
    return found


def try_reward(
    reward: Reward, prompts: Sequence[Text], records: Sequence[Mapping[str, Any]]
) -> Reward:
    """The reward, after it has scored empty answers to the first prompts. Raises what it raises."""
    count = min(TRIED, len(prompts))
    reward(Answers(list(prompts[:count]), [""] * count, [[]] * count, list(records[:count])))
    return reward


def model_reward(path: str, *, dtype: str, template: Any, mesh: Mesh | None) -> Reward:
    """A reward model, loaded, with its own tokenizer; ``dtype`` is that of weights and computations.

    A text is scored as TRL does it: prompt and answer through the chat template, or one string behind
    the other, without further special tokens. `train.models.reward.check_reward_model` has checked
    the directory or hub name. Raises `UserError` where tokenizer or weights cannot be used.
    """
    tokenizer: Any = load_tokenizer(path, "reward.model")
    with blamed_on("reward.model"):
        encoder = Encoder(tokenizer, template)
        model = load_reward_model(path, dtype=np.dtype(dtype), mesh=mesh)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    graphdef, *weights = model

    def score(weights: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return last_token_scores(RewardModel(graphdef, *weights), tokens, mask)

    compiled = jax.jit(score, out_shardings=everywhere)

    def reward(answers: Answers) -> np.ndarray:
        with blamed_on("reward.model"):
            texts = [
                encoder.whole_texts(Row(prompt, (answer,), "a sampled answer"))[0]
                for prompt, answer in zip(answers.prompts, answers.messages(), strict=True)
            ]
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        width, count = padded_width(largest_of_all(max(map(len, rows)))), len(rows)
        # The first prompts alone may be fewer than the devices.
        filled = rows + rows[:1] * (-count % row_devices(mesh))
        tokens, mask = pad_rows(filled, width, encoder.pad_id, left=True)
        batch = put_batch({"tokens": tokens, "mask": mask}, mesh)
        scores = np.asarray(compiled(weights, **batch))
        return _numbers(own_rows(scores, mesh)[:count], count, f"reward.model {path}")

    return reward
