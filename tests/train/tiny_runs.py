"""Tiny model directories, data files and command lines for tests of whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")


def make_tokenizer(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, and the two marks of ChatML."""
    tokens = [*SPECIAL, *extra, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1]
    )
    made.chat_template = CHATML
    return made


def make_model_dir(
    path: Path, seed: int = 0, *, hidden: int = 32, extra_tokens: tuple[str, ...] = ()
) -> Path:
    """A random Llama of two layers with its tokenizer, in float32."""
    tokenizer = make_tokenizer(extra_tokens)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_records(count: int = 40) -> list[dict[str, Any]]:
    """Sums, each with a polite and a rude answer of varying lengths."""
    rng = np.random.default_rng(0)
    records = []
    for first, second in rng.integers(1, 50, (count, 2)).tolist():
        total = first + second
        records.append(
            {
                "prompt": [{"role": "user", "content": f"{first}+{second}?"}],
                "chosen": f"{total}, dear",
                "rejected": f"{total}" + "!" * (1 + total % 4),
                "output": f"{total}",
                "number": total,
            }
        )
    return records


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_inputs(directory: Path) -> dict[str, str]:
    """A model, its base, preferences and SFT examples: `{"model", "base", "pairs", "examples"}`."""
    records = make_records()
    examples = [{"prompt": one["prompt"], "completion": one["output"]} for one in records]
    return {
        "model": str(make_model_dir(directory / "model", 1)),
        "base": str(make_model_dir(directory / "base", 2)),
        "pairs": str(write_jsonl(directory / "pairs.jsonl", records)),
        "examples": str(write_jsonl(directory / "examples.jsonl", examples)),
    }


def flags(values: dict[str, Any]) -> list[str]:
    """`{"trainer.steps": 3}` as command-line flags; None leaves a field out."""
    given = {name: value for name, value in values.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def run_flags(inputs: dict[str, str], output: Path, **changes: Any) -> list[str]:
    """Flags of a short preference run with OnDARE; `changes` name fields with `__` for the dot."""
    values: dict[str, Any] = {
        "model.path": inputs["model"],
        "model.base": inputs["base"],
        "data.path": inputs["pairs"],
        "data.eval_fraction": 0.2,
        "data.max_prompt_length": 64,
        "data.max_completion_length": 16,
        "optimizer.name": "on_dare",
        "optimizer.learning_rate": 1e-3,
        "optimizer.alpha": 1e-3,
        "optimizer.density": 0.5,
        "trainer.batch_size": 8,
        "trainer.steps": 6,
        "output_dir": output,
    }
    return flags(values | {name.replace("__", "."): value for name, value in changes.items()})


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of an exported model."""
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")
