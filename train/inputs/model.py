"""What every command checks and reads before a weight is loaded: models, tokenizers, records."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from train.config import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    RecordOptions,
    SFTDataOptions,
    UserError,
)
from train.data import (
    Record,
    TokenDataset,
    answer_names,
    mix,
    pack,
    padding_share,
    read_records,
    saves_by_sharing,
    split_by_prompt,
)
from train.data.formats import SUFFIXES
from train.files.checksums import hash_file
from train.models import ModelConfig, check_hf_compatible, resolve_model_dir
from train.models.attention import check_attention
from train.models.lora import CONFIG_FILE, TARGETS, WEIGHTS_FILE, read_adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenize = Callable[..., TokenDataset]


@contextlib.contextmanager
def blamed_on(name: str) -> Iterator[None]:
    """Turns errors about what a field points to into a `UserError` that names the field.

    Example:
        >>> with blamed_on("model.path"):  # doctest: +SKIP
        ...     check_hf_compatible(path)
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{name}: {error}") from error


def check_model(options: ModelOptions, name: str = "model.path") -> ModelConfig:
    """Checks a model directory from config.json and the headers of its files.

    Args:
        options: The model and its types.
        name: Field that gave it, for messages.

    Returns:
        The model's configuration with the dtypes and the remat setting of `options`.

    Raises:
        UserError: something is missing, damaged or not supported.
    """
    with blamed_on(name):
        config = check_hf_compatible(options.path)
    config = as_set(config, options)
    with blamed_on("model"):
        check_attention(config)
    return config if options.lora is None else with_adapters(config, options.lora)


def as_set(config: ModelConfig, options: ModelOptions) -> ModelConfig:
    """The configuration of a model with the types and programs that the settings choose."""
    return dataclasses.replace(
        config,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        remat=options.remat,
        attention=options.attention,
    )


def with_adapters(config: ModelConfig, options: LoraOptions) -> ModelConfig:
    """The configuration of the model with adapters.

    Raises:
        UserError: a module is unknown, or `lora.adapter` is of another shape or damaged.
    """
    name = "model.lora.target_modules"
    unknown = [module for module in options.target_modules if module not in TARGETS]
    if unknown or not options.target_modules:
        found = repr(unknown[0]) if unknown else "nothing"
        raise UserError(f"{name}: got {found}; choose from {', '.join(TARGETS)}.")
    targets = tuple(module for module in TARGETS if module in options.target_modules)
    scale = options.alpha / options.rank
    if options.adapter is not None:
        with blamed_on("model.lora.adapter"):
            found = read_adapter_config(options.adapter)
        if found != (options.rank, scale, targets):
            raise UserError(
                f"model.lora.adapter has rank {found[0]}, alpha / rank {found[1]:g} and the modules "
                f"{', '.join(found[2])}; give model.lora.rank {found[0]}, alpha "
                f"{found[1] * found[0]:g} and these target_modules."
            )
    return dataclasses.replace(
        config, lora_targets=targets, lora_rank=options.rank, lora_scale=scale
    )


def check_related(path: str, model: str, name: str) -> None:
    """Checks that another model has the parameters and the vocabulary of the model.

    Args:
        path: The other one: the base, or a reference.
        model: The model.
        name: Field that gave `path`, for messages.

    Raises:
        UserError: it is missing or damaged, or names what differs.
    """
    with blamed_on(name):
        check_hf_compatible(path, same_shapes_as=model)
    theirs, ours = (load_tokenizer(one, name).get_vocab() for one in (path, model))
    differing = sorted(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t))
    if differing:
        token = differing[0]
        raise UserError(
            f"{name}: its tokenizer differs from that of {model} in {len(differing)} tokens, for "
            f"example {token!r}: id {theirs.get(token)} and {ours.get(token)}."
        )


def load_tokenizer(path: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Args:
        path: Directory or hub name.
        name: Field that gave it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    with blamed_on(name):
        return AutoTokenizer.from_pretrained(resolve_model_dir(path))


def load_data(
    options: DataOptions,
    tokenize: Tokenize,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> tuple[TokenDataset, TokenDataset | None]:
    """Reads, splits and tokenises the records of a run, and says what became of them.

    Args:
        options: Where they are and how long they may be.
        tokenize: `train.data.tokenize_sft` or `tokenize_preference`.
        tokenizer: The model's.
        console: Where the counts are shown.

    Returns:
        The training rows, and the held-out ones if any.

    Raises:
        UserError: a file is missing, a line is broken, a record cannot be used as it is, or the
            records to evaluate on are those to train on.
    """
    eval_split = options.eval_split or "test"
    _check_apart(options, eval_split)
    parts: list[TokenDataset] = []
    evaluations: list[TokenDataset] = []
    for path in (options.path, *options.mix):
        name = "data.path" if path == options.path else f"data.mix: {path}"
        source = dataclasses.replace(options, path=path)
        records, held_out = split_records(source, name)
        parts.append(tokenized(records, source, name, tokenize, tokenizer))
        if options.mix:
            console.print(f"{path}: {parts[-1].report}", highlight=False)
        if held_out is not None:
            evaluations.append(tokenized(held_out, source, name, tokenize, tokenizer))
    if options.eval_path is not None:
        with blamed_on("data.eval_path"):
            held_out = read_records(options.eval_path, eval_split)
        evaluations.append(tokenized(held_out, options, "data.eval_path", tokenize, tokenizer))
    with blamed_on("data.mix"):
        train = _together(parts, [1.0, *options.mix.values()], options)
    console.print(f"Training records: {train.report}", highlight=False)
    if not evaluations:
        return train, None
    evaluation = _together(evaluations, [1.0] * len(evaluations), options)
    console.print(f"Held-out records: {evaluation.report}", highlight=False)
    return train, evaluation


def _check_apart(options: DataOptions, eval_split: str) -> None:
    """Raises `UserError` where what is evaluated on is trained on: one file, or one split."""
    held_out = options.eval_path
    if held_out is None:
        return
    is_file = held_out.endswith(SUFFIXES)
    for path in (options.path, *options.mix):
        if is_file and Path(path).resolve() == Path(held_out).resolve():
            raise UserError(
                f"data.eval_path: {path!r} is trained on; give another file, or data.eval_fraction "
                "to hold out a share of it."
            )
        if not is_file and path == held_out and _share_rows(options.split, eval_split):
            raise UserError(
                f"data.eval_path: the split {options.split!r} of {path!r} is trained on, and "
                f"data.eval_split is {eval_split!r}; give another split."
            )


def _share_rows(split: str, other: str) -> bool:
    """Whether a part of one is in the other for certain: "train" in "train[:5%]", "train+test"."""
    pairs = itertools.product(split.split("+"), other.split("+"))
    return any(a == b or a == b.split("[")[0] or b == a.split("[")[0] for a, b in pairs)


def packed(options: SFTDataOptions, data: TokenDataset, console: Console) -> TokenDataset:
    """The training examples, several to a row where `options` ask for it, which is said.

    Raises:
        UserError: an example is longer than a row.
    """
    if not options.packing:
        return data
    length = options.packed_length
    if length is None:
        length = options.max_prompt_length + options.max_completion_length
    with blamed_on("data.packed_length"):
        rows = pack(data, length)
    console.print(
        f"Packed: {len(data)} examples in {len(rows)} rows of {length} tokens, padding "
        f"{padding_share(rows.arrays):.1%}",
        highlight=False,
    )
    return rows


def _together(
    parts: Sequence[TokenDataset], weights: Sequence[float], options: RecordOptions
) -> TokenDataset:
    dataset = parts[0] if len(parts) == 1 else mix(parts, weights)
    return sharing_prompts(dataset, options)


def sharing_prompts(dataset: TokenDataset, options: RecordOptions) -> TokenDataset:
    """The data set with prompts computed once for both answers where `options` ask for it.

    Raises:
        UserError: they ask for it where a record has one answer.
    """
    wanted = options.prefix_sharing
    if wanted is True and answer_names(dataset.arrays) != ["chosen", "rejected"]:
        raise UserError(
            "data.prefix_sharing is true, but these records have one answer each; unset it."
        )
    shares = saves_by_sharing(dataset.arrays) if wanted == "auto" else wanted
    return dataclasses.replace(dataset, share_prompts=shares)


def split_records(
    options: RecordOptions, name: str
) -> tuple[Sequence[Record], Sequence[Record] | None]:
    """Reads records and holds out a share of them.

    Args:
        options: Where they are.
        name: Field that gave them, for messages.

    Returns:
        The records, and those held out, or None where nothing is to be held out.

    Raises:
        UserError: the file is missing or broken, or one side would be empty.
    """
    with blamed_on(name):
        records = read_records(options.path, options.split)
    if options.eval_fraction is None:
        return records, None
    with blamed_on(name):
        return split_by_prompt(records, options.eval_fraction, options.split_seed)


def tokenized(
    records: Sequence[Record],
    options: RecordOptions,
    name: str,
    tokenize: Tokenize,
    tokenizer: PreTrainedTokenizerBase,
) -> TokenDataset:
    """Rows of tokens. Raises `UserError`, naming the field `name` that the records are from."""
    with blamed_on(name):
        return tokenize(
            records,
            tokenizer,
            max_prompt_length=options.max_prompt_length,
            max_completion_length=options.max_completion_length,
            template=options.template,
            truncation=options.truncation,
        )


def hash_model(path: str) -> str:
    """SHA-256 of a model's configuration and weights, as stored."""
    directory = resolve_model_dir(path)
    digest = hashlib.sha256()
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        digest.update(file.name.encode() + hash_file(file).encode())
    return digest.hexdigest()


def hash_start(options: ModelOptions) -> dict[str, str]:
    """Content hashes of what training starts from, by name."""
    hashes = {"model": hash_model(options.path)}
    if options.lora is not None and options.lora.adapter is not None:
        hashes["adapter"] = hash_adapter(options.lora.adapter)
    return hashes


def hash_adapter(directory: str) -> str:
    """SHA-256 of an adapter's settings and weights, as stored."""
    digest = hashlib.sha256()
    with blamed_on("model.lora.adapter"):
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            digest.update(hash_file(Path(directory) / name).encode())
    return digest.hexdigest()
