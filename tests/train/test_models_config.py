import json

import jax.numpy as jnp
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.train.tiny_models import LLAMA3_SCALING, SMALL
from train.models import ModelConfig
from train.models.rope import inverse_frequencies

LLAMA = {"model_type": "llama", **SMALL}


@pytest.mark.parametrize(
    ("config_class", "model_type"),
    [(LlamaConfig, "llama"), (Qwen2Config, "qwen2"), (Qwen3Config, "qwen3")],
)
def test_absent_fields_take_the_defaults_of_transformers(config_class, model_type):
    ours, theirs = ModelConfig.from_hf({"model_type": model_type}), config_class()
    width, heads = theirs.hidden_size, theirs.num_attention_heads
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == width
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or width // heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.initializer_range == theirs.initializer_range


def test_layouts_of_transformers_4_and_5_agree():
    scaling = {k: v for k, v in LLAMA3_SCALING.items() if k != "rope_theta"}
    v4 = ModelConfig.from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    v5 = ModelConfig.from_hf({**LLAMA, "rope_parameters": LLAMA3_SCALING})
    legacy = {"type": "linear", "factor": 2.0}
    assert v4 == v5
    assert v4.rope_theta == 5e5
    assert dict(v4.rope_scaling)["factor"] == 8.0
    assert ModelConfig.from_hf({**LLAMA, "rope_scaling": legacy}).rope_scaling == (
        ("rope_type", "linear"),
        ("factor", 2.0),
    )
    assert ModelConfig.from_hf({**LLAMA, "rope_scaling": None, "rope_theta": 7.0}).rope_theta == 7.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 5e5, "factor": 3.0},
        LLAMA3_SCALING,
        {**LLAMA3_SCALING, "original_max_position_embeddings": 8192, "factor": 32.0},
    ],
)
def test_rotary_frequencies_equal_those_of_transformers(rope):
    fields = {**LLAMA, "head_dim": 64, "hidden_size": 384, "rope_parameters": rope}
    theirs = LlamaConfig(**{k: v for k, v in fields.items() if k != "model_type"})
    if rope["rope_type"] == "default":
        expected = 1.0 / rope["rope_theta"] ** (torch.arange(0, 64, 2).double() / 64)
    else:
        expected = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs)[0]
    found = torch.tensor(inverse_frequencies(ModelConfig.from_hf(fields)))
    torch.testing.assert_close(found, expected.float(), rtol=5e-7, atol=0)


def test_reads_what_transformers_writes(tmp_path):
    for config in (
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        Qwen2Config(**{**SMALL, "attention_bias": True}),  # Qwen2 ignores that field
        Qwen3Config(**SMALL, head_dim=32),
    ):
        config.save_pretrained(tmp_path)
        ours = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
        again = AutoConfig.from_pretrained(tmp_path)
        assert ours.num_kv_heads == again.num_key_value_heads
        assert ours.qkv_bias == (config.model_type != "qwen3")
        assert ours.o_bias == ours.mlp_bias == (config.model_type == "llama")
        assert ours.qk_norm == (config.model_type == "qwen3")
        assert ours.tie_word_embeddings == (config.model_type == "llama")


def test_overrides_and_hash():
    config = ModelConfig.from_hf(LLAMA, dtype=jnp.bfloat16, remat="full")
    assert config.dtype == jnp.bfloat16
    assert config.param_dtype == jnp.float32
    assert config.remat == "full"
    assert hash(config) == hash(ModelConfig.from_hf(LLAMA, dtype="bfloat16", remat="full"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; supported are llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; supported is 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*unquantised checkpoint"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*'full_att"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_scaling.rope_type is 'yarn'; supported are default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "lacks low_freq_factor, high_freq"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, r"numbers, got \{'factor': '2'\}"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters differs by layer type"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; supported is a positive number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; supported is a positive integer"),
        ({"vocab_size": "96"}, "vocab_size is '96'; supported is a positive integer"),
        ({"num_attention_heads": None}, "num_attention_heads is None; supported is a positive"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4; supported is a divisor of 6"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "hidden_size 48 is not a multiple"),
        ({"head_dim": 7}, "head_dim is 7; supported is an even number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; supported is a positive number"),
    ],
)
def test_what_is_not_supported_is_named_with_its_value(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**LLAMA, **change})


def test_unused_sliding_window_is_accepted():
    qwen = {"model_type": "qwen2", **SMALL, "sliding_window": 32768, "max_window_layers": 1}
    full = {**qwen, "use_sliding_window": False, "layer_types": ["full_attention"] * 3}
    assert ModelConfig.from_hf(qwen) == ModelConfig.from_hf(full)
    ModelConfig.from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": -1}, "num_layers must be a positive integer, got -1"),
        ({"num_kv_heads": 4}, "num_heads must be a multiple of num_kv_heads, got 6 and 4"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"dtype": jnp.int32}, "dtype must be a floating-point dtype, got int32"),
    ],
)
def test_constructor_rejects_impossible_shapes(change, message):
    fields = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 48,
        "intermediate_size": 8,
        "num_layers": 1,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    ModelConfig(**fields)
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**fields, **change})
