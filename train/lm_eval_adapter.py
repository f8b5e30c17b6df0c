"""The decoder as a model of lm-evaluation-harness, so that any of its tasks runs on it.

Needs the extra ``eval`` (``lm_eval``). From Python::

    import lm_eval
    from train.lm_eval_adapter import DecoderLM

    results = lm_eval.simple_evaluate(DecoderLM("runs/on_dare/export"), tasks=["gsm8k"])
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

from train.data.dataset import pad_left
from train.evaluate import end_tokens
from train.models import from_hf, split_model
from train.prepare import load_tokenizer
from train.sampling import make_greedy
from train.windows import Window, score_windows, sliding_windows, window_scorer

_WIDTH = 64


class DecoderLM(TemplateLM):
    """A model directory, scored and continued by our decoder.

    Generation is greedy; a task that asks for sampling is refused.

    Args:
        path: Directory in Hugging Face format, or a hub name.
        batch_size: Requests at once.
        dtype: Type of the computations; parameters stay float32.
        max_length: Longest sequence in tokens; what is before it is cut off. Unset: what the model
            was made for, at most 4096.
        max_gen_toks: Tokens to generate where a task does not say.
    """

    def __init__(
        self,
        path: str,
        *,
        batch_size: int = 16,
        dtype: str = "float32",
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        self.path, self.batch_size, self.max_gen_toks = path, batch_size, max_gen_toks
        self.tokenizer: Any = load_tokenizer(path, "model")
        model = from_hf(path, dtype=np.dtype(dtype), param_dtype=np.dtype("float32"))
        self.max_length = max_length or min(4096, model.config.max_position_embeddings)
        self._graphdef, self._params = split_model(model)
        self._score = window_scorer(self._graphdef)
        self._pad_id = self.tokenizer.pad_token_id or 0
        self._ends = end_tokens(path, self.tokenizer)
        self._generators: dict[int, Any] = {}

    @property
    def eot_token_id(self) -> int:
        """Token that stands before a text without context, where there is no BOS."""
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """BOS, or the end token in its place."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's cache of requests."""
        return self.path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; without special tokens unless asked for."""
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's template, for the harness's records."""
        return (self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one string."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        windows = []
        for _, context, continuation in requests:
            # One token more than the model sees: the last one is only predicted.
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            windows.append(Window(tokens, max(1, len(tokens) - len(continuation))))
        return self._scored(windows, "loglikelihood")

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in disjoint pieces behind one token of context each."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = [self.prefix_token_id, *self.tok_encode(request.args[0])]
            pieces = sliding_windows(tokens, self.max_length + 1, self.max_length)
            windows += pieces
            owners += [number] * len(pieces)
        sums = np.zeros(len(requests))
        for owner, (logp, _) in zip(owners, self._scored(windows, "rolling"), strict=True):
            sums[owner] += logp
        return sums.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first stop string.

        Raises:
            ValueError: a task asks for sampling.
        """
        results = [""] * len(requests)
        groups: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise ValueError(f"only greedy generation is offered, got {options}")
            length = options.get("max_gen_toks", self.max_gen_toks)
            groups.setdefault(length, []).append(number)
        for length, numbers in groups.items():
            prompts = {n: self._prompt(requests[n].args[0], length) for n in numbers}
            numbers.sort(key=lambda n: len(prompts[n]))
            for start in range(0, len(numbers), self.batch_size):
                chosen = numbers[start : start + self.batch_size]
                texts = self._continued([prompts[n] for n in chosen], length)
                for n, text in zip(chosen, texts, strict=True):
                    results[n] = _cut(text, requests[n].args[1].get("until", []))
        return results

    def _prompt(self, text: str, length: int) -> list[int]:
        room = self.max_length - length
        if room < 1:
            raise ValueError(
                f"max_gen_toks {length} leaves no room in max_length {self.max_length}"
            )
        return self.tok_encode(text)[-room:] or [self.prefix_token_id]

    def _continued(self, prompts: list[list[int]], length: int) -> list[str]:
        width = -(-len(prompts[-1]) // _WIDTH) * _WIDTH
        rows = prompts + [prompts[0]] * (self.batch_size - len(prompts))
        generate = self._generator(length)
        out = np.asarray(generate(self._params, *pad_left(rows, width, self._pad_id)))
        return self.tokenizer.batch_decode(out[: len(prompts)], skip_special_tokens=True)

    def _generator(self, length: int) -> Any:
        """Kept by length, so that each is compiled once."""
        if length not in self._generators:
            self._generators[length] = make_greedy(
                self._graphdef, max_new_tokens=length, eos_id=self._ends, pad_id=self._pad_id
            )
        return self._generators[length]

    def _scored(self, windows: list[Window], shown_as: str) -> list[tuple[float, bool]]:
        logps, greedy = score_windows(
            self._score,
            self._params,
            windows,
            batch_size=self.batch_size,
            pad_id=self._pad_id,
            shown_as=shown_as,
        )
        return list(zip(logps.tolist(), greedy.tolist(), strict=True))


def _cut(text: str, until: str | list[str]) -> str:
    stops = [until] if isinstance(until, str) else until
    for stop in filter(None, stops):
        text = text.split(stop)[0]
    return text
