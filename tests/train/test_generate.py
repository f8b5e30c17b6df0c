import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.train.tiny_models import padded_batch, save_model
from train.generate import make_greedy
from train.models import from_hf, split_model

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
