"""Figures that follow from the shapes alone: what a step must compute, and roughly what it needs.

Where there is no compiler for a machine, `estimate` stands in for it. It knows the arrays that
dominate, not how a compiler fuses and reuses them: expect a quarter more or less.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from train.config import DPOConfig
from train.distributed.batches import row_devices
from train.models import ModelConfig
from train.models.hf_names import decoder_leaves
from train.objectives.logps import resolve_vocab_chunk
from train.plan.figures import Memory, State, Work
from train.plan.network import crossing
from train.plan.program import shares_prompts


class Rows(NamedTuple):
    """The rows of one pair; `scored` and `seen` are sums over all of them."""

    number: int
    length: int  # tokens of a row
    scored: int  # tokens whose log-probability is taken
    seen: float  # pairs of tokens of which one attends to the other


def rows_of_pair(config: DPOConfig) -> Rows:
    """The rows of a pair whose prompt and answers are as long as they may be."""
    prompt, answer = config.data.max_prompt_length, config.data.max_completion_length
    own = answer**2 / 2 + answer * prompt
    if shares_prompts(config):
        return Rows(1, prompt + 2 * answer, 2 * answer, prompt**2 / 2 + 2 * own)
    return Rows(2, prompt + answer, 2 * answer, prompt**2 + 2 * own)


def model_flops(config: DPOConfig, model: ModelConfig) -> float:
    """Floating-point operations that forward and backward pass of a step need, over all chips.

    Every weight of the layers makes 6 for a token, those of the output matrix for a scored token, and
    attention 12 for a layer, a channel of its heads and a pair of tokens of which one sees the other
    (Chowdhery et al. 2022, appendix B). Nothing is computed twice.
    """
    pair = rows_of_pair(config)
    weights = layer_weights(model) * pair.number * pair.length
    output = model.vocab_size * model.hidden_size * pair.scored
    attention = model.num_layers * model.num_heads * model.head_dim * pair.seen
    return config.trainer.batch_size * (6.0 * (weights + output) + 12.0 * attention)


def layer_weights(model: ModelConfig) -> int:
    """Entries of the matrices of all layers."""
    leaves = decoder_leaves(model).items()
    return sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1] == "kernel")


def estimate(
    config: DPOConfig, model: ModelConfig, mesh: Any, state: State, node: int = 0
) -> tuple[Memory, Work]:
    """Temporaries and work of a chip from formulas; bytes moved in memory are not estimated.

    `node` is the number of chips of a host, where a slower network joins hosts, and 0 elsewhere.
    """
    memory = Memory(state, padding=0.0, temporaries=temporaries(config, model, mesh, state))
    return memory, _work(config, model, mesh, node)


def _size(dtype: Any) -> int:
    return jnp.dtype(dtype).itemsize


def temporaries(config: DPOConfig, model: ModelConfig, mesh: Any, state: State) -> float:
    """Bytes that a step needs besides what it holds, roughly; arguments as those of `estimate`."""
    parts, tensor = config.trainer.gradient_accumulation_steps, mesh.shape["tensor"]
    pair = rows_of_pair(config)
    pairs = config.trainer.batch_size / row_devices(mesh) / parts
    tokens = pairs * pair.number * pair.length
    item, held = _size(config.model.dtype), _size(config.model.param_dtype)
    width, inner = model.hidden_size, model.intermediate_size / tensor
    heads = model.num_heads / tensor
    projected = (heads + 2 * model.num_kv_heads / tensor) * model.head_dim
    # Flash attention holds no matrix of all pairs of tokens.
    plain = config.model.attention == "xla"
    scores = 4 * pairs * pair.number * heads * pair.length**2 if plain else 0.0
    residual = tokens * width * item / tensor
    products = tokens * item * (projected + 2 * inner) + 2 * residual
    kept = {
        "full": residual,
        "weight_dots": residual + products,
        "dots": residual + products + 2 * scores,
        "none": residual + 2 * products + 3 * scores,
    }[config.model.remat]
    layer = layer_weights(model) / model.num_layers / tensor * item
    one_layer = 3 * scores + 2 * products + 2 * layer
    chunk = resolve_vocab_chunk(config.loss.vocab_chunk, model.vocab_size) or model.vocab_size
    logits = 2 * 4 * pairs * pair.scored * chunk / tensor
    gradients = state.parameters * (1 if parts == 1 else 1 + 4 / held)
    return model.num_layers * kept + max(one_layer, logits) + gradients


def _work(config: DPOConfig, model: ModelConfig, mesh: Any, node: int) -> Work:
    pair, pairs = rows_of_pair(config), config.trainer.batch_size
    tokens = pairs * pair.number * pair.length
    again = 1 if config.model.remat == "full" else 0
    attention = pairs * _attention_flops(config, model, pair)
    output = 2.0 * model.vocab_size * model.hidden_size * pairs * pair.scored
    chunked = resolve_vocab_chunk(config.loss.vocab_chunk, model.vocab_size) is not None
    flops = 2.0 * layer_weights(model) * tokens * (3 + again) + attention + output * (3 + chunked)
    return Work(flops / mesh.size, None, *_moved(config, model, mesh, node))


def _attention_flops(config: DPOConfig, model: ModelConfig, pair: Rows) -> float:
    """FLOPs of attention of one pair's rows in all layers, forward and backward.

    Plain attention makes two products of all pairs of tokens and four backward, and the first two
    again unless they are kept. Flash attention makes five backward (Dao 2023, section 4.1) and the
    first two again under any policy of remat, as these keep no kernel's result; it leaves out later
    tokens, but not where a mask says who sees whom.
    """
    remat = config.model.remat
    if config.model.attention == "xla":
        products, looked_at = 6 + 2 * (remat in ("full", "weight_dots")), 1.0
    else:
        products, looked_at = 7 + 2 * (remat != "none"), 1.0 if shares_prompts(config) else 0.5
    scores = pair.number * looked_at * pair.length**2
    return 2.0 * products * model.num_layers * model.num_heads * model.head_dim * scores


def _moved(
    config: DPOConfig, model: ModelConfig, mesh: Any, node: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that collectives bring to a chip, over links and over the network.

    Every pass gathers the parameters, and the gradients are scattered once (Rajbhandari et al. 2020,
    section 7) and summed over ``data``. With parts of a batch all this is done for each, but for the
    sum, which counts once: XLA's compiler for GPUs moves a sum out of a loop where it can. With
    ``tensor`` there is a gather and a scatter around attention and around the feed-forward block, in
    each pass (Korthikanti et al. 2022).
    """
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    weights = sum(math.prod(leaf.shape) for leaf in decoder_leaves(model).values())
    held = _size(config.model.param_dtype) / tensor * weights
    pair, passes = rows_of_pair(config), 3 if config.model.remat == "full" else 2
    tokens = config.trainer.batch_size * pair.number * pair.length / row_devices(mesh)
    residual = tokens * model.hidden_size * _size(config.model.dtype)
    parts = config.trainer.gradient_accumulation_steps
    # For each kind: bytes of what is gathered or scattered, among how many chips, and their stride.
    kinds = {
        "parameters and gradients": (parts * (passes + 1) * held, fsdp, tensor),
        "gradients over data, once a step": (2 * held / fsdp, data, fsdp * tensor),
        "activations": (4 * model.num_layers * passes * residual, tensor, 1),
    }
    sent, network = {}, {}
    for kind, (size, chips, stride) in kinds.items():
        if chips > 1:
            network[kind] = crossing(size, chips, stride, node)
            sent[kind] = size * (1 - 1 / chips) - network[kind]
    return sent, {kind: size for kind, size in network.items() if size}
