import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.train.tiny_models import decoder_logits, padded_batch, save_model
from train.generation.filters import Filters, filter_logits
from train.generation.sampler import Sampler, make_greedy
from train.models import from_hf, merge_model, split_model

PROMPTS = [(0, 9), (4, 9), (8, 9)]
NEW = 12


def transformers_greedy(model, tokens, mask, eos, pad):
    """transformers' greedy continuation, padded to NEW tokens."""
    out = model.generate(
        torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    new = out[:, tokens.shape[1] :].numpy()
    return np.pad(new, ((0, 0), (0, NEW - new.shape[1])), constant_values=pad)


@pytest.mark.parametrize("name", ["llama3-rope-scaling", "qwen2-tied", "qwen3"])
def test_tokens_equal_those_of_transformers(name, tmp_path):
    theirs = save_model(name, tmp_path)
    graphdef, params = split_model(from_hf(tmp_path))
    tokens, mask = padded_batch(PROMPTS, 9)
    unending = transformers_greedy(theirs, tokens, mask, eos=[0], pad=0)
    # Ends that row 0 reaches in the middle and row 1 at once, so rows stop at different steps.
    for eos in ([0], [int(unending[0, 3]), int(unending[1, 0])]):
        generate = make_greedy(graphdef, max_new_tokens=NEW, eos_id=eos, pad_id=1)
        found = generate(params, jnp.asarray(tokens), jnp.asarray(mask))
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(
            found, transformers_greedy(theirs, tokens, mask, eos=eos, pad=1)
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    save_model("llama-gqa-theta1e4", directory)
    return split_model(from_hf(directory))


def test_cache_gives_what_running_everything_again_gives(tiny):
    graphdef, params = tiny
    tokens, mask = padded_batch(PROMPTS, 9)
    generate = make_greedy(graphdef, max_new_tokens=6, eos_id=-1, pad_id=0)
    cached = np.asarray(generate(params, tokens, mask))
    one_more = make_greedy(graphdef, max_new_tokens=1, eos_id=-1, pad_id=0)
    # A few of the steps suffice; each is another compilation.
    for step in (1, 4):
        longer = np.concatenate([tokens, cached[:, :step]], axis=1)
        seen = np.pad(mask, ((0, 0), (0, step)), constant_values=True)
        np.testing.assert_array_equal(one_more(params, longer, seen)[:, 0], cached[:, step])


def test_padding_content_and_width_do_not_matter(tiny):
    graphdef, params = tiny
    generate = make_greedy(graphdef, max_new_tokens=5, eos_id=2, pad_id=0)
    tokens, mask = padded_batch(PROMPTS, 9)
    plain = generate(params, tokens, mask)
    np.testing.assert_array_equal(plain, generate(params, np.where(mask, tokens, 7), mask))
    wider = np.pad(tokens, ((0, 0), (6, 0))), np.pad(mask, ((0, 0), (6, 0)))
    np.testing.assert_array_equal(plain, generate(params, *wider))


def test_works_inside_jit(tiny):
    graphdef, params = tiny
    generate = make_greedy(graphdef, max_new_tokens=3, eos_id=2, pad_id=0)
    tokens, mask = padded_batch(PROMPTS, 9)
    np.testing.assert_array_equal(
        jax.jit(generate)(params, tokens, mask), generate(params, tokens, mask)
    )


@pytest.mark.parametrize("row", [[True, True, False], [False] * 3, [True, False, True]])
def test_masks_that_are_not_left_padded_are_refused(tiny, row):
    graphdef, params = tiny
    generate = make_greedy(graphdef, max_new_tokens=3, eos_id=2, pad_id=0)
    mask = np.array([[True] * 3, row])
    with pytest.raises(ValueError, match=r"padded on the left .*: rows \[1\]"):
        generate(params, jnp.zeros((2, 3), jnp.int32), mask)


def test_number_of_tokens_is_checked(tiny):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        make_greedy(tiny[0], max_new_tokens=0, eos_id=2, pad_id=0)


def test_logps_are_those_of_the_uncached_model(tiny):
    graphdef, params = tiny
    tokens, mask = padded_batch(PROMPTS, 9)
    keys = jax.random.split(jax.random.key(3), 3)
    sampler = Sampler(graphdef, 6, [5, 6, 7, 8, 9, 10, 11, 12], 0, Filters(0.7, top_k=20))
    found = sampler(params, tokens, mask, keys)
    whole = np.concatenate([tokens, found.tokens], axis=1)
    seen = np.concatenate([mask, found.mask], axis=1)
    logits = decoder_logits(merge_model(graphdef, params), whole, seen)[:, 8:-1]
    logps = jax.nn.log_softmax(logits / 0.7)
    expected = np.take_along_axis(np.asarray(logps), np.asarray(found.tokens)[..., None], 2)[..., 0]
    valid = np.asarray(found.mask)
    np.testing.assert_allclose(found.logps[valid], expected[valid], rtol=0, atol=1e-5)
    assert not np.asarray(found.logps)[~valid].any()


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch_and_streaming_gives_the_same(tiny):
    graphdef, params = tiny
    tokens, mask = padded_batch(PROMPTS, 9)
    keys = jax.random.split(jax.random.key(1), 3)
    sampler = Sampler(graphdef, 7, 2, 0, Filters(1.3, top_p=0.9))
    together = np.asarray(sampler(params, tokens, mask, keys).tokens)
    alone = sampler(params, tokens[1:2, 2:], mask[1:2, 2:], keys[1:2])
    np.testing.assert_array_equal(alone.tokens[0], together[1])
    streamed = np.stack(list(sampler.stream(params, tokens, mask, keys)), axis=1)
    np.testing.assert_array_equal(streamed, together[:, : streamed.shape[1]])
    other = sampler(params, tokens, mask, jax.random.split(jax.random.key(2), 3)).tokens
    assert (other != together).any()


PROCESSORS = {
    "top_k": (Filters(0.8, top_k=7), [TemperatureLogitsWarper(0.8), TopKLogitsWarper(7)]),
    "top_p": (Filters(1.5, top_p=0.6), [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.6)]),
    "min_p": (Filters(min_p=0.2), [MinPLogitsWarper(0.2)]),
    "all": (
        Filters(2.0, top_k=30, top_p=0.8, min_p=0.05),
        [
            TemperatureLogitsWarper(2.0),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_filters_equal_those_of_transformers(name):
    filters, processors = PROCESSORS[name]
    logits = np.random.default_rng(0).normal(0, 2, (64, 96)).astype(np.float32)
    expected = torch.tensor(logits)
    for processor in processors:
        expected = processor(None, expected)
    found = np.asarray(filter_logits(jnp.asarray(logits), filters))
    assert 1 < np.isfinite(found).sum(1).mean() < 90
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_tokens_are_drawn_with_the_exact_probabilities(tiny):
    graphdef, params = tiny
    draws, filters = 4000, Filters(1.5, top_k=8)
    tokens, mask = (np.repeat(one[:1], draws, 0) for one in padded_batch([(0, 5)], 5))
    keys = jax.random.split(jax.random.key(0), draws)
    drawn = Sampler(graphdef, 1, 2, 0, filters)(params, tokens, mask, keys).tokens[:, 0]
    logits = decoder_logits(merge_model(graphdef, params), tokens[:1], mask[:1])[0, -1]
    scores = TopKLogitsWarper(8)(None, torch.tensor(logits)[None] / 1.5)
    expected = draws * torch.softmax(scores, -1)[0].numpy()
    counts = np.bincount(drawn, minlength=96)
    kept = expected > 0
    assert kept.sum() == 8
    assert not counts[~kept].any()
    # 99.9th percentile of chi-square with 7 degrees of freedom.
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 24.3


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"min_p": 1.5}])
def test_filters_are_checked(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        Filters(**bad)


def test_sampling_needs_keys(tiny):
    tokens, mask = padded_batch(PROMPTS, 9)
    with pytest.raises(ValueError, match=r"temperature 1.0 needs a key"):
        Sampler(tiny[0], 2, 2, 0)(tiny[1], tokens, mask)
