"""What formulas say of flash attention, against what forward and backward pass need."""

import dataclasses

import pytest
from jax.sharding import AbstractMesh

from tests.train.builders import make_plan_config
from train.plan.advice import advice
from train.plan.arithmetic import estimate, model_flops, temporaries
from train.plan.figures import State
from train.plan.measure import make_plan
from train.plan.program import read_shape
from train.plan.target import read_target

MODEL = read_shape("qwen2.5-0.5b")
MESH = AbstractMesh((1, 2, 1), ("data", "fsdp", "tensor"))
NOTHING = State(parameters=0.0, optimizer=0.0, delta=0.0, batch=0.0)


def config_of(attention, *, length=256, shared=False, **model):
    """Of 8 pairs with prompts and answers of `length` tokens."""
    config = make_plan_config("unused", attention=attention, dtype="bfloat16", **model)
    lengths = {"max_prompt_length": length, "max_completion_length": length}
    data = dataclasses.replace(config.data, **lengths, prefix_sharing=shared)
    loss = dataclasses.replace(config.loss, vocab_chunk=None)  # logits are computed once
    return dataclasses.replace(config, data=data, loss=loss)


def growth(attention, remat):
    sizes = (config_of(attention, length=length, remat=remat) for length in (1024, 2048))
    short, long = (temporaries(config, MODEL, MESH, NOTHING) for config in sizes)
    return long / short


@pytest.mark.parametrize("remat", ["none", "dots", "weight_dots", "full"])
@pytest.mark.parametrize("attention", ["cudnn", "splash"])
def test_flash_attention_keeps_nothing_that_grows_with_the_square(attention, remat):
    assert growth(attention, remat) <= 2
    if remat != "full":  # where logits need more than a layer does
        assert growth("xla", remat) > 2.1


@pytest.mark.parametrize(("attention", "square"), [("xla", True), ("cudnn", False)])
def test_advice_names_the_square_where_there_is_one(attention, square):
    config = config_of(attention, length=1024, param_dtype="bfloat16")
    plan = make_plan(config, MODEL, read_target("gpu:1x4"))
    assert not plan.fits
    assert plan.memory.state.total < 4e9
    found = advice(config, plan)
    assert square == any("grow with the square" in line for line in found)


def flops(config):
    return 2 * estimate(config, MODEL, MESH, NOTHING)[1].flops


def product(rows, tokens):
    """A product of queries and keys, of all pairs of tokens."""
    return 2 * MODEL.num_layers * MODEL.num_heads * MODEL.head_dim * 8 * rows * tokens**2


def test_flash_attention_computes_what_is_seen_and_its_scores_twice():
    """Forward and backward pass need six products (Chowdhery et al. 2022), and it makes seven."""
    config = config_of("cudnn", remat="none")
    half = product(rows=2, tokens=512) / 2
    assert flops(config) == pytest.approx(model_flops(config, MODEL) + half)
    plain = config_of("xla", remat="none")
    assert flops(plain) == pytest.approx(model_flops(plain, MODEL) + 6 * half)


@pytest.mark.parametrize("remat", ["dots", "weight_dots"])
def test_no_policy_keeps_what_a_kernel_computes(remat):
    again = flops(config_of("cudnn", remat=remat)) - flops(config_of("cudnn", remat="none"))
    assert again == pytest.approx(2 * product(rows=2, tokens=512) / 2)


def test_a_shared_prompt_leaves_cudnn_no_half_out():
    """Who sees whom is then a mask, and not that a token sees the earlier ones."""
    one_more = flops(config_of("cudnn", shared=True)) - flops(config_of("xla", shared=True))
    assert one_more == pytest.approx(product(rows=1, tokens=768))
