"""Our decoder as a model of lm-evaluation-harness, so that any of its tasks runs on it.

Needs the package ``lm_eval``, which only this module imports: ``pip install "omerge_jax[eval]"``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from train.evaluation.likelihoods import Query, likelihood_scorer
from train.generation.greedy_text import greedy_writer
from train.inputs.model import load_tokenizer
from train.models import from_hf, split_model
from train.models.model_dir import end_tokens

_MAX_GEN_TOKS = 256  # where a task says nothing, as in the harness's own models


class DecoderLM(TemplateLM):
    """A Hugging Face directory, run by `train.models.Decoder`.

    Texts become tokens as with the harness's ``hf`` model: tokens are added at the start of a text
    where the tokenizer does it, the end of a context that is too long is kept. Generation is greedy;
    a task that samples is refused.

    Args:
        model: A directory or hub name.
        batch_size: Texts computed at once.
        dtype: The type of the computations; parameters stay float32.
        max_length: Tokens that the model may see. By default as many as it has positions.

    Raises:
        UserError: the tokenizer or generation_config.json is missing or damaged.
        ValueError: the model is; see `train.models.from_hf`.

    Example:
        >>> import lm_eval                                               # doctest: +SKIP
        >>> lm = DecoderLM("runs/on_ties/export", batch_size=16)         # doctest: +SKIP
        >>> lm_eval.simple_evaluate(lm, tasks=["arc_easy", "gsm8k"])     # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path,
        *,
        batch_size: int = 8,
        dtype: Any = "float32",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self._model = str(model)
        # transformers types ids as int, str or lists of either; these are plain ids.
        self.tokenizer: Any = load_tokenizer(self._model, "model")
        decoder = from_hf(model, dtype=np.dtype(dtype), param_dtype=np.dtype("float32"))
        graphdef, self._params = split_model(decoder)
        self.max_length = max_length or decoder.config.max_position_embeddings
        self.batch_size = batch_size
        pad_id = self.tokenizer.pad_token_id or 0
        self._score = likelihood_scorer(graphdef, batch_size=batch_size, pad_id=pad_id)
        ends = end_tokens(self._model, self.tokenizer)
        self._write = greedy_writer(graphdef, self.tokenizer, ends=ends, batch_size=batch_size)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self._model.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; one that begins with BOS already gets no second one."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **given)["input_ids"]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the tokenizer's template writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        asked = []
        for _, context, tokens in requests:
            if len(tokens) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(tokens)} tokens, but the model sees {self.max_length}"
                )
            # The last token is only predicted, never read, so one more fits.
            room = self.max_length + 1 - len(tokens)
            asked.append(Query(context[-room:], [tokens]))
        label = "" if disable_tqdm else "log-likelihoods"
        logps, greedy = self._score(self._params, asked, label)
        found = list(zip(logps[:, 0].tolist(), greedy[:, 0].tolist(), strict=True))
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, each token with as much context as fits."""
        asked: list[Query] = []
        sources: list[int] = []  # the text of every window
        for number, request in enumerate(requests):
            tokens = self.tok_encode(cast(tuple[str], request.args)[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            cut = [make_disjoint_window(pair) for pair in pairs]
            asked += [Query(context, [scored]) for context, scored in cut]
            sources += [number] * len(cut)
        label = "" if disable_tqdm else "rolling log-likelihoods"
        logps, _ = self._score(self._params, asked, label)
        sums = [0.0] * len(requests)
        for number, logp in zip(sources, logps[:, 0].tolist(), strict=True):
            sums[number] += logp
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut off before the first text of ``until``.

        Raises:
            ValueError: a task samples, or asks for more tokens than the model sees.
        """
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[_generation(cast(tuple[str, dict[str, Any]], request.args)[1])].append(number)
        texts: dict[int, str] = {}
        for (new, stop), numbers in groups.items():
            room = self.max_length - new
            if room < 1:
                raise ValueError(
                    f"a task generates {new} tokens, but the model sees {self.max_length}"
                )
            prompts = [self.tok_encode(str(requests[n].args[0]))[-room:] for n in numbers]
            label = "" if disable_tqdm else "generating"
            written = self._write(self._params, prompts, new, stop, label)
            texts.update(zip(numbers, written, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]


def _generation(kwargs: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The number of tokens to generate, and the texts to stop at."""
    if kwargs.get("do_sample") and kwargs.get("temperature", 1.0) > 0:
        raise ValueError(f"only greedy generation is supported, but a task asks for {kwargs}")
    until: str | Sequence[str] = kwargs.get("until") or ()
    new = kwargs.get("max_gen_toks", kwargs.get("max_new_tokens", _MAX_GEN_TOKS))
    return int(new), (until,) if isinstance(until, str) else tuple(until)
