"""What a checkpoint's ``config.json`` says about the network, checked before any weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

# The values that transformers assumes when config.json leaves a field out; they differ by family.
_COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "head_dim": None,
}
_QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": {**_QWEN_DEFAULTS, "head_dim": 128},
}
# Positive integers, by their names in config.json and in `ModelConfig`.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
_DEFAULT_ROPE_THETA = 10000.0
FREE_FIELDS = (
    "dtype",
    "param_dtype",
    "remat",
    "attention",
    "initializer_range",
    "max_position_embeddings",
)
"""Fields of `ModelConfig` that do not change what the network computes from given parameters."""
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder of the Llama, Qwen2 or Qwen3 family. Hashable.

    Attributes:
        model_type: ``"llama"`` (Llama 2 to 3.2, SmolLM2), ``"qwen2"`` (Qwen1.5 to 2.5) or
            ``"qwen3"``.
        num_kv_heads: key and value heads; a divisor of ``num_heads``.
        head_dim: width of a head; even.
        rms_norm_eps: added to the mean square before its root.
        rope_theta: base of the rotary frequencies.
        rope_scaling: sorted ``(name, value)`` pairs, ``rope_type`` being ``"linear"`` or
            ``"llama3"``; empty for plain rotary embeddings.
        tie_word_embeddings: the output matrix is the transposed embedding.
        qk_norm: RMS norm on every query and key head.
        max_position_embeddings: longest sequence the checkpoint was made for, in tokens.
        initializer_range: standard deviation of freshly drawn matrices.
        dtype: dtype of activations and matrix products; norms, softmax and rotations are float32. How
            exact float32 products are on GPU and TPU is up to ``jax_default_matmul_precision``.
        param_dtype: dtype of the stored parameters.
        remat: what each block computes again in the backward pass: a name in
            `train.models.decoder.REMAT_POLICIES`.
        attention: ``"xla"``; ``"cudnn"`` for cuDNN's flash attention (half-precision ``dtype``,
            NVIDIA GPU); ``"splash"`` for Pallas' on a TPU (no prompt shared within a row).
        lora_targets: names of the linear layers that have low-rank adapters.
        lora_scale: factor of the product of an adapter's two matrices.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = _DEFAULT_ROPE_THETA
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    lora_targets: tuple[str, ...] = ()
    lora_rank: int = 0
    lora_scale: float = 1.0

    def __post_init__(self):
        for name in _SIZES.values():
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        for name in ("dtype", "param_dtype"):
            found = np.dtype(getattr(self, name))
            if not jnp.issubdtype(found, jnp.floating):
                raise ValueError(f"{name} must be a floating-point dtype, got {found}")
            object.__setattr__(self, name, found)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> ModelConfig:
        """Reads the dictionary of a ``config.json`` in the layout of transformers 4 or 5.

        Fields that the file leaves out take the value that transformers gives them for that family.
        ``overrides`` are fields of this class to set instead, such as ``dtype`` or ``remat``.

        Raises:
            ValueError: the file asks for something this decoder does not compute (another model
                type, activation, rotary scaling, sliding windows, dropout, quantised weights); the
                message names the field, its value and what is supported.

        Example:
            >>> config = ModelConfig.from_hf({"model_type": "llama", "hidden_size": 64,
            ...     "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128})
            >>> config.head_dim, config.num_kv_heads
            (16, 4)
        """
        model_type = hf.get("model_type")
        if model_type not in _FAMILY_DEFAULTS:
            raise ValueError(
                f"config.json: model_type is {model_type!r}; supported are "
                f"{', '.join(sorted(_FAMILY_DEFAULTS))} (dense decoders: Llama 2/3/3.1/3.2, "
                "SmolLM2, Qwen1.5/2/2.5, Qwen3)"
            )
        full = {**_COMMON_DEFAULTS, **_FAMILY_DEFAULTS[model_type], **hf}
        if full["num_key_value_heads"] is None:
            full["num_key_value_heads"] = full["num_attention_heads"]
        if full["head_dim"] is None:
            full["head_dim"] = _head_dim(full)
        _check_supported(full)
        theta, scaling = _read_rope(full)
        attention_bias = bool(full["attention_bias"])
        fields: dict[str, Any] = {
            "model_type": model_type,
            **{ours: full[theirs] for theirs, ours in _SIZES.items()},
            "rms_norm_eps": float(full["rms_norm_eps"]),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": bool(full["tie_word_embeddings"]),
            # Qwen2 always has these three biases and no other, whatever attention_bias says.
            "qkv_bias": model_type == "qwen2" or attention_bias,
            "o_bias": model_type != "qwen2" and attention_bias,
            "mlp_bias": model_type == "llama" and bool(full["mlp_bias"]),
            "qk_norm": model_type == "qwen3",
            "initializer_range": float(full["initializer_range"]),
        }
        return cls(**{**fields, **overrides})


def _head_dim(full: Mapping[str, Any]) -> int | None:
    """The width of a head where it is null; None when the fields that it follows from are invalid."""
    heads, width = full["num_attention_heads"], full["hidden_size"]
    if not _is_count(heads) or not _is_count(width):
        return None
    if width % heads:
        raise ValueError(
            f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads}, "
            "and there is no head_dim"
        )
    return width // heads


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_supported(full: Mapping[str, Any]) -> None:
    """Refuses what the decoder does not compute, naming the field."""

    def reject(field: str, supported: str) -> None:
        raise ValueError(f"config.json: {field} is {full[field]!r}; supported is {supported}")

    for field in _SIZES:
        if not _is_count(full[field]):
            reject(field, "a positive integer")
    for field in ("rms_norm_eps", "initializer_range"):
        if not isinstance(full[field], (int, float)) or not full[field] > 0:
            reject(field, "a positive number")
    if full["num_attention_heads"] % full["num_key_value_heads"]:
        reject("num_key_value_heads", f"a divisor of {full['num_attention_heads']} query heads")
    if full["head_dim"] % 2:
        reject("head_dim", "an even number")
    if full["hidden_act"] != "silu":
        reject("hidden_act", "'silu'")
    if full["attention_dropout"]:
        reject("attention_dropout", "0")
    if full.get("quantization_config"):
        reject("quantization_config", "none: load the unquantised checkpoint")
    if full.get("partial_rotary_factor") not in (None, 1, 1.0):
        reject("partial_rotary_factor", "1")
    layer_types = full.get("layer_types")
    if layer_types is not None and set(layer_types) - {"full_attention"}:
        reject("layer_types", "'full_attention' in every layer")
    windowed = full.get("use_sliding_window") and full.get("sliding_window", 4096) is not None
    first_windowed = full.get("max_window_layers", 28)
    if layer_types is None and windowed and first_windowed < full["num_hidden_layers"]:
        reject("use_sliding_window", "false (full attention in every layer)")


def _read_rope(full: Mapping[str, Any]) -> tuple[float, tuple[tuple[str, Any], ...]]:
    """Rotary base and scaling from ``rope_parameters`` (v5) or ``rope_scaling`` (v4)."""
    field = "rope_parameters" if full.get("rope_parameters") else "rope_scaling"
    rope = dict(full.get(field) or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"config.json: {field} differs by layer type, which is not supported")
    theta = rope.pop("rope_theta", full.get("rope_theta"))
    theta = _DEFAULT_ROPE_THETA if theta is None else theta
    if not isinstance(theta, (int, float)) or not theta > 0:
        raise ValueError(f"config.json: rope_theta is {theta!r}; supported is a positive number")
    legacy_type = rope.pop("type", None)  # the spelling before "rope_type"
    kind = rope.pop("rope_type", legacy_type or "default")
    if kind not in _ROPE_FIELDS:
        raise ValueError(
            f"config.json: {field}.rope_type is {kind!r}; supported are {', '.join(_ROPE_FIELDS)}"
        )
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: {field}.partial_rotary_factor must be 1")
    if kind == "default":
        return float(theta), ()
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", full["max_position_embeddings"])
    missing = [name for name in _ROPE_FIELDS[kind] if name not in rope]
    if missing:
        raise ValueError(
            f"config.json: {field} has rope_type {kind!r} but lacks {', '.join(missing)}"
        )
    bad = {n: rope[n] for n in _ROPE_FIELDS[kind] if not isinstance(rope[n], (int, float))}
    if bad:
        raise ValueError(f"config.json: {field} must hold numbers, got {bad}")
    kept = {name: float(rope[name]) for name in _ROPE_FIELDS[kind]}
    return float(theta), (("rope_type", kind), *sorted(kept.items()))
