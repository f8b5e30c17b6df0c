"""``python -m train generate``: continuations of a prompt or of a file of prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from train.config import GenerateConfig, ModelOptions, UserError, check_settings
from train.data import Record, read_records
from train.data.padding import pad_prompts
from train.data.tokenizing import encode_prompts
from train.files.continued_lines import continued_lines
from train.files.whole import check_new_file
from train.generation.filters import Filters
from train.generation.sampler import Sampler
from train.inputs.model import blamed_on, check_model, hash_model, load_tokenizer
from train.models import ModelConfig, from_hf, split_model
from train.models.abstract import abstract_model
from train.models.model_dir import end_tokens
from train.types import Params


def generate_text(config: GenerateConfig) -> None:
    """Writes the continuations to the terminal or to a new file.

    Raises `UserError` before weights are read where something given cannot be used.
    """
    console = Console()
    filters = _check(config)
    options = ModelOptions(path=config.model, dtype=config.dtype)
    model = check_model(options, name="model")
    tokenizer = load_tokenizer(config.model, "model")
    name = "prompt" if config.prompts is None else "prompts"
    with blamed_on(name):
        if config.prompts is None:
            records = [Record({"prompt": config.prompt}, "record")]
        else:
            records = read_records(config.prompts, config.split)
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
    """Writes a line for every record that is left, `done` of them being there already."""
    if done:
        console.print(f"{done} records were written before; {len(records)} are left.")
    shown = track(completions, "generating", len(records), console=console)
    for record, completion in zip(records, shown, strict=True):
        # Parquet and the hub have fields that JSON has no type for, such as dates.
        line = json.dumps({**record, **completion}, ensure_ascii=False, default=str)
        file.write(line.encode() + b"\n")
        file.flush()


def _key(config: GenerateConfig, records: Any, prompts: Any, ends: list[int]) -> str:
    """Hashes all that a continuation depends on; draws depend on its number, not on the batch."""
    settings = dataclasses.asdict(config)
    del settings["output"], settings["batch_size"]
    asked = (settings, hash_model(config.model), records, prompts, ends)
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:12]


def _check(config: GenerateConfig) -> Filters:
    check_settings(config)
    if (config.prompt is None) == (config.prompts is None):
        raise UserError("Give exactly one of prompt and prompts.")
    if (config.prompts is None) != (config.output is None):
        raise UserError(
            "output is the file for the continuations of prompts: give both, or neither."
        )
    if config.output is not None:
        check_new_file(Path(config.output), "output")
    return Filters(config.temperature, config.top_k, config.top_p, config.min_p)


def _check_lengths(
    name: str, prompts: Sequence[Sequence[int]], new: int, model: ModelConfig
) -> None:
    """Raises `UserError` where a prompt and its continuation are longer than the model reaches."""
    longest = max(map(len, prompts))
    if longest + new > model.max_position_embeddings:
        raise UserError(
            f"{name}: the longest prompt has {longest} tokens, which with max_new_tokens {new} is "
            f"more than the model's {model.max_position_embeddings} positions; shorten either."
        )


def _keys(seed: int, rows: np.ndarray) -> jax.Array:
    """Makes the random keys that the rows of the file draw with."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def _show(
    sampler: Sampler, params: Params, prompt: list[int], tokenizer: Any, seed: int, out: IO[str]
) -> None:
    """Writes text as soon as its bytes are whole characters."""
    ids: list[int] = []
    text, written = "", 0
    tokens, mask = pad_prompts([prompt], sampler.pad_id)
    for token in sampler.stream(params, tokens, mask, _keys(seed, np.arange(1))):
        ids.append(int(token[0]))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            out.write(text[written:])
            out.flush()
            written = len(text)
    out.write(text[written:] + "\n")


def _complete(
    sampler: Sampler,
    params: Params,
    prompts: Sequence[list[int]],
    tokenizer: Any,
    config: GenerateConfig,
    done: int,
) -> Iterator[dict[str, Any]]:
    """Yields what is added to every record from the number `done` on, in their order."""
    size = config.batch_size
    for start in range(done, len(prompts), size):
        rows = np.arange(start, min(start + size, len(prompts)))
        # The last batch repeats its last row, so that it has the shape of the others.
        filled = np.pad(rows, (0, size - len(rows)), mode="edge")
        tokens, mask = pad_prompts([prompts[row] for row in filled], sampler.pad_id)
        found = sampler(params, tokens, mask, _keys(config.seed, filled))
        answers, used = np.asarray(found.tokens), np.asarray(found.mask)
        for row in range(len(rows)):
            ids = answers[row][used[row]]
            yield {
                "generated": tokenizer.decode(ids, skip_special_tokens=True),
                "generated_tokens": len(ids),
                "finish_reason": "stop" if ids[-1] in np.asarray(sampler.eos_id) else "length",
            }
