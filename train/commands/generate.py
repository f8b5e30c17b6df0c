"""``python -m train generate``: continuations of a prompt or of a file of prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from train.config import GenerateConfig, ModelOptions, UserError, check_settings
from train.data import Record, UnusableRecord, read_records
from train.data.records import prompt_of
from train.data.templates import Encoder, Row
from train.distributed.mesh import Params, abstract_model
from train.files.continued_lines import continued_lines
from train.files.run_directory import check_place
from train.generation.filters import Filters
from train.generation.sampler import Sampler
from train.inputs.model import blamed_on, check_model, hash_model, load_tokenizer
from train.models import ModelConfig, from_hf, resolve_model_dir, split_model

_WIDTH_STEP = 32  # prompts are padded to multiples of it, so that few shapes are compiled


def run(config: GenerateConfig) -> None:
    """Writes the continuations to the terminal or to a new file.

    Raises:
        UserError: something given cannot be used; before weights are read.
    """
    console = Console()
    filters = _check(config)
    options = ModelOptions(path=config.model, dtype=config.dtype)
    model = check_model(options, name="model")
    tokenizer = load_tokenizer(config.model, "model")
    name = "prompt" if config.prompts is None else "prompts"
    with blamed_on(name):
        records = _records(config)
        prompts = encode_prompts(records, tokenizer, chat_template=config.chat_template)
    _check_lengths(name, prompts, config.max_new_tokens, model)
    pad_id: Any = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    ends = end_tokens(config.model, tokenizer)
    graphdef = abstract_model(model, None)[0]
    sampler = Sampler(graphdef, config.max_new_tokens, ends, pad_id, filters)
    with blamed_on("model"):
        types = {"dtype": np.dtype(config.dtype), "param_dtype": np.dtype("float32")}
        params = split_model(from_hf(config.model, **types))[1]
    if config.output is None:
        _show(sampler, params, prompts[0], tokenizer, config.seed, console.file)
        return
    with blamed_on("output"):
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        key = _key(config, records, prompts, ends)
        with continued_lines(Path(config.output), key) as (file, done):
            completions = _complete(sampler, params, prompts, tokenizer, config, done)
            _write(file, records[done:], completions, done, console)
    console.print(f"Written to {config.output}", highlight=False, soft_wrap=True)


def _write(
    file: BinaryIO,
    records: Sequence[Record],
    completions: Iterator[dict[str, Any]],
    done: int,
    console: Console,
) -> None:
    if done:
        console.print(f"{done} records were written before; {len(records)} are left.")
    shown = track(completions, "generating", len(records), console=console)
    for record, completion in zip(records, shown, strict=True):
        file.write(_line({**record, **completion}))
        file.flush()


def _key(config: GenerateConfig, records: Any, prompts: Any, ends: list[int]) -> str:
    """Of what every continuation depends on; prompts are drawn for by number, so not the batch."""
    settings = dataclasses.asdict(config)
    del settings["output"], settings["batch_size"]
    asked = (settings, hash_model(config.model), records, prompts, ends)
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:12]


def _line(record: Mapping[str, Any]) -> bytes:
    # Parquet and the hub have fields that JSON has no type for, such as dates.
    return json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n"


def encode_prompts(
    records: Sequence[Record], tokenizer: Any, *, chat_template: bool
) -> list[list[int]]:
    """Token ids of every record's prompt, ready to be continued.

    Args:
        records: with a field ``prompt``: text, or messages.
        tokenizer: from transformers.
        chat_template: make a user turn of text.

    Raises:
        DataError: a record has no prompt, or one that cannot be used.
    """
    rows = [Row(*prompt_of(record)) for record in records]
    encoded = Encoder(tokenizer, "chat" if chat_template else "auto").encode(rows)
    prompts = []
    for row, found in zip(rows, encoded, strict=True):
        if isinstance(found, UnusableRecord):
            raise ValueError(f"{row.where}: {found}.")
        prompts.append(found.prompt)
    return prompts


def end_tokens(model: str, tokenizer: Any) -> list[int]:
    """The tokenizer's EOS and those of the model's generation_config.json, sorted; [-1] without any.

    Raises:
        UserError: the file is no JSON object, or its ``eos_token_id`` no token ids.
    """
    ends = {tokenizer.eos_token_id} - {None}
    file = resolve_model_dir(model) / "generation_config.json"
    if not file.is_file():
        return sorted(ends) or [-1]  # only the length ends a row
    try:
        more = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        more = [] if more is None else more if isinstance(more, list) else [more]
        return sorted(ends | {int(one) for one in more}) or [-1]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"model: {file} has no usable eos_token_id ({error}).") from error


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and bool mask ``[batch, width]``, the width a multiple of 32."""
    width = -(-max(map(len, prompts)) // _WIDTH_STEP) * _WIDTH_STEP
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = True
    return tokens, mask


def _check(config: GenerateConfig) -> Filters:
    check_settings(config)
    if (config.prompt is None) == (config.prompts is None):
        raise UserError("Give exactly one of prompt and prompts.")
    if (config.prompts is None) != (config.output is None):
        raise UserError(
            "output is the file for the continuations of prompts: give both, or neither."
        )
    if config.output is not None:
        output = Path(config.output)
        if output.exists():
            raise UserError(f"output: {config.output!r} exists; nothing is overwritten.")
        check_place(output, "output")
    return Filters(config.temperature, config.top_k, config.top_p, config.min_p)


def _records(config: GenerateConfig) -> Sequence[Record]:
    if config.prompts is None:
        return [Record({"prompt": config.prompt}, "record")]
    return read_records(config.prompts, config.split)


def _check_lengths(
    name: str, prompts: Sequence[Sequence[int]], new: int, model: ModelConfig
) -> None:
    longest = max(map(len, prompts))
    if longest + new > model.max_position_embeddings:
        raise UserError(
            f"{name}: the longest prompt has {longest} tokens, which with max_new_tokens {new} is "
            f"more than the model's {model.max_position_embeddings} positions; shorten either."
        )


def _keys(seed: int, rows: np.ndarray) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def _show(
    sampler: Sampler, params: Params, prompt: list[int], tokenizer: Any, seed: int, out: IO[str]
) -> None:
    """Writes text as soon as its bytes are whole characters."""
    ids: list[int] = []
    written = ""
    tokens, mask = pad_left([prompt], sampler.pad_id)
    for token in sampler.stream(params, tokens, mask, _keys(seed, np.arange(1))):
        ids.append(int(token[0]))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            out.write(text[len(written) :])
            out.flush()
            written = text
    out.write(tokenizer.decode(ids, skip_special_tokens=True)[len(written) :] + "\n")


def _complete(
    sampler: Sampler,
    params: Params,
    prompts: Sequence[list[int]],
    tokenizer: Any,
    config: GenerateConfig,
    done: int,
) -> Iterator[dict[str, Any]]:
    """What is added to every record from the number `done` on, in their order."""
    size = config.batch_size
    for start in range(done, len(prompts), size):
        rows = np.arange(start, min(start + size, len(prompts)))
        # The last batch repeats its last row, so that it has the shape of the others.
        filled = np.pad(rows, (0, size - len(rows)), mode="edge")
        tokens, mask = pad_left([prompts[row] for row in filled], sampler.pad_id)
        found = sampler(params, tokens, mask, _keys(config.seed, filled))
        for ids, used in zip(np.asarray(found.tokens), np.asarray(found.mask), strict=True):
            if not len(rows):
                break
            rows = rows[1:]
            ids = ids[used]
            yield {
                "generated": tokenizer.decode(ids, skip_special_tokens=True),
                "generated_tokens": len(ids),
                "finish_reason": "stop" if ids[-1] in np.asarray(sampler.eos_id) else "length",
            }
