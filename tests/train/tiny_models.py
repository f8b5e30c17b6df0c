"""Random tiny Hugging Face models that between them use every option of the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from train.models import Decoder, merge_model, split_model

torch.set_num_threads(1)  # tests run side by side

VOCAB = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# With 8 channels a head, an original context of 32 puts wavelengths in all three bands of llama3.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _theta(value: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa-theta1e4": ("llama", _theta(1e4)),
    "llama-mha-theta1e4": ("llama", {**_theta(1e4), "num_key_value_heads": 6}),
    "llama-gqa-theta5e5": ("llama", _theta(5e5)),
    "llama3-rope-scaling": ("llama", {"rope_parameters": LLAMA3_SCALING}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-tied": ("llama", {**_theta(1e5), "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 20, "rms_norm_eps": 1e-3}),
    "qwen2-untied": ("qwen2", _theta(1e6)),
    "qwen2-tied": ("qwen2", {**_theta(1e6), "tie_word_embeddings": True}),
    "qwen2-mha": ("qwen2", {"num_key_value_heads": 6}),
    "qwen3": ("qwen3", _theta(1e6)),
    "qwen3-tied-mqa": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
}


def make_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model in evaluation mode; norm weights and biases are random too."""
    family, options = CASES[name]
    config_class, model_class, defaults = FAMILIES[family]
    model = model_class(config_class(**{**SMALL, **defaults, **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(1 + 0.3 * noise if is_norm else 0.15 * noise)
    return model


def save_model(name: str, directory: Path, seed: int = 0) -> PreTrainedModel:
    """Writes `make_model` with transformers and returns it."""
    model = make_model(name, seed)
    model.save_pretrained(directory)
    return model


def padded_batch(lengths: list[tuple[int, int]], width: int, seed: int = 0):
    """Random tokens with real ones in ``[start, stop)`` of each row; int32 tokens, bool mask."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, (len(lengths), width), dtype=np.int32)
    columns = np.arange(width)
    mask = np.stack([(columns >= start) & (columns < stop) for start, stop in lengths])
    return tokens, mask


@jax.jit(static_argnums=0)
def _logits(graphdef, params, tokens, mask):
    return merge_model(graphdef, params)(tokens, mask)


def decoder_logits(model: Decoder, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What our decoder says, compiled once per shape, its parameters no constants."""
    return np.asarray(_logits(*split_model(model), tokens, mask))


def transformers_logits(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits with the attention mask and with the positions that transformers' generate counts."""
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions),
        )
    return out.logits.float().numpy()
