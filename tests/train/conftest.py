"""Fixtures that several test modules share: tiny tokenisers made on the spot."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The capital of France is Paris. The capital of Italy is Rome.",
    "Evaluate the following phrase by transforming it into the spelling given.",
    "What is two plus three? Two plus three is five, and that is final.",
    "Name a colour. Blue is a colour; so are green, red and yellow!",
]
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokeniser without chat template that adds nothing to a text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(), eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: every text starts with BOS."""
    tokenizer = _byte_level_bpe()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With the ChatML template of Qwen and SmolLM2, whose turns end in `<|im_end|>\\n`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer
