"""What several test modules build: models, batches, settings, and programs of the plan command."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

import omerge_jax as om
from tests.train.tiny_models import SMALL
from tests.train.tiny_runs import flags, make_tokenizer
from train.config import (
    DataOptions,
    DPOConfig,
    OptimizerOptions,
    PolicyOptions,
    PreferenceLossOptions,
    ScheduleOptions,
    TrainerOptions,
)
from train.models import Decoder, ModelConfig, split_model

VOCAB, ROWS, PROMPT, COMPLETION = 61, 4, 7, 6
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "on_dare": lambda: om.on_dare_adamw(1e-2, alpha=1e-3, density=0.5),
    # An eps of the gradients' size: Adam's first updates are otherwise nearly all ±learning rate, and
    # rounding, which differs between meshes, would choose among those ties.
    "on_ties": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-2, eps=1e-2),
        om.on_ties(alpha=1e-3, density=0.5),
    ),
}


def make_model(seed=0):
    return split_model(Decoder(ModelConfig.from_hf(CONFIG), nnx.Rngs(seed)))


def make_batch(names, seed=0):
    rng = np.random.default_rng(seed)
    batch = {
        "prompt_tokens": rng.integers(0, VOCAB, (ROWS, PROMPT), dtype=np.int32),
        "prompt_mask": np.arange(PROMPT) >= rng.integers(0, PROMPT - 1, (ROWS, 1)),
    }
    for name in names:
        batch[f"{name}_tokens"] = rng.integers(0, VOCAB, (ROWS, COMPLETION), dtype=np.int32)
        batch[f"{name}_mask"] = np.arange(COMPLETION) < rng.integers(1, COMPLETION + 1, (ROWS, 1))
    return batch


GOOD = DPOConfig(
    output_dir="out",
    model=PolicyOptions(path="sft", base="base"),
    data=DataOptions(path="pairs.jsonl", eval_fraction=0.1),
    optimizer=OptimizerOptions(learning_rate=1e-6),
    trainer=TrainerOptions(batch_size=4, steps=10),
    loss=PreferenceLossOptions(),
    schedule=ScheduleOptions(),
)


def make_plan_config(path, **model):
    optimizer = {"alpha": 5e-7, "density": 0.01, "delta_dtype": "bfloat16"}
    return DPOConfig(
        output_dir="unused",
        model=PolicyOptions(path=path, base="unused", **model),
        data=DataOptions(path="unused", max_prompt_length=8, max_completion_length=8),
        optimizer=OptimizerOptions(name="on_dare", learning_rate=1e-6, **optimizer),
        trainer=TrainerOptions(batch_size=8, steps=10),
    )


REWARD_FAMILIES = {
    "llama": (LlamaConfig, LlamaForSequenceClassification, {}),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForSequenceClassification, {"head_dim": 16}),
}
TOKENIZER_VOCAB, UNUSED_TOKEN = 264, 263  # no text has the last one


def save_reward_model(path, family="llama", *, labels=1, seed=0):
    """A random model for sequence classification with the tests' tokenizer."""
    config_class, model_class, options = REWARD_FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(
        **{
            **SMALL,
            **options,
            "vocab_size": TOKENIZER_VOCAB,
            "pad_token_id": UNUSED_TOKEN,
            "initializer_range": 0.3,
        },
        num_labels=labels,
    )
    model = model_class(config).eval()
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return model


ROOT = Path(__file__).parents[2]
COMPILER = Path(sys.prefix) / "tpu"
HAS_COMPILER = (COMPILER / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None


needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="the TPU compiler is not built for this platform"
)


def run_with_compiler(*arguments, devices=None):
    """Runs Python where the TPU compiler can be imported, if it is installed; returns its output."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(COMPILER), env.get("PYTHONPATH", "")])
    if devices is not None:
        count = f"--xla_force_host_platform_device_count={devices}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {count}"
    done = subprocess.run(
        [sys.executable, *arguments],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr + done.stdout


def planned(values, tmp_path, topology):
    """The content of the file that the command line writes."""
    file = tmp_path / "plan.json"
    values = {**values, "topology": topology, "output_file": file}
    shown = run_with_compiler("-m", "train", "plan", *flags(values))
    assert "total" in shown
    return json.loads(file.read_text())


def big(model, batch_size, **changes):
    """The settings of a plan for a published model, of which nothing but its shapes is needed."""
    values = {
        "model.path": model,
        "model.dtype": "bfloat16",
        "model.param_dtype": "bfloat16",
        "model.remat": "full",
        "data.path": "unused",
        "data.max_prompt_length": 1024,
        "data.max_completion_length": 1024,
        "optimizer.name": "on_dare",
        "optimizer.learning_rate": 1e-6,
        "optimizer.alpha": 5e-7,
        "optimizer.density": 0.01,
        "optimizer.delta_dtype": "bfloat16",
        "trainer.batch_size": batch_size,
        "trainer.steps": 100,
    }
    return values | changes


def tiny(path, batch_size, **changes):
    """The same for a model of two narrow layers and rows of 192 tokens."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config.save_pretrained(path)
    lengths = {"data.max_prompt_length": 64, "data.max_completion_length": 64}
    return big(path, batch_size, **lengths, **changes)
