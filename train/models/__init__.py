"""Decoders of the Llama, Qwen2 and Qwen3 families and their Hugging Face directories."""

from train.models.abstract import param_shardings
from train.models.config import ModelConfig
from train.models.decoder import Decoder, layer_axes, merge_model, split_model
from train.models.hf import check_hf_compatible, from_hf
from train.models.hf_export import to_hf
from train.models.model_dir import read_hf_config, resolve_model_dir

__all__ = [
    "Decoder",
    "ModelConfig",
    "check_hf_compatible",
    "from_hf",
    "layer_axes",
    "merge_model",
    "param_shardings",
    "read_hf_config",
    "resolve_model_dir",
    "split_model",
    "to_hf",
]
