"""Samples answers to prompts, scores them, and makes pairs of a better and a worse one.

This runs on the host between the loader and the train step. What is drawn depends on the seed, the
number of steps done and the place in the batch alone, so a resumed run samples what it would have
sampled, and the number of processes does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from train.data import TokenDataset, normalise_prompt
from train.data.layout import Widths, share_prompt
from train.distributed.batches import (
    agree_on_shared_rows,
    own_rows,
    put_batch,
    row_numbers,
    row_parts,
)
from train.distributed.processes import fetch
from train.evaluation.held_out import bucketed_batches
from train.generation.sampler import Sampler
from train.objectives.accumulate import BatchLoss
from train.on_policy.reward import Answers, Reward
from train.types import Batch, Evaluate, Metrics, Params, Score

ANSWERS = 2

_SHOWN = 2  # held-out answers that are shown at an evaluation
_TRAINING, _HELD_OUT = 0, 1  # streams of random numbers
_NAMES = ("chosen", "rejected")


@dataclass(frozen=True)
class Sampled:
    """Answers to the prompts of this process, those to prompt ``i`` at ``i``, ``i + n`` ….

    ``tokens`` int32 and ``mask`` bool are ``[answers, max_new_tokens]``; ``ended`` bool ``[answers]``
    says whether the end token came. ``scores`` float64 ``[answers]`` are less the penalty for a
    missing end; they are ``[answers, rewards]`` where a reward gives several.
    """

    tokens: np.ndarray
    mask: np.ndarray
    ended: np.ndarray
    scores: np.ndarray
    texts: list[str]


Figures = Callable[[Sampled], Mapping[str, np.ndarray]]
"""Gives figures to report, each ``[answers]``, a score first; NaN where an answer has no figure."""


class OnPolicy:
    """Samples and scores answers with the parameters of the moment.

    The sampler has a temperature above 0. An answer that has not ended loses ``missing_eos_penalty``
    of its score. ``console`` shows a few held-out answers at every evaluation.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: Any,
        reward: Reward,
        *,
        missing_eos_penalty: float | None = None,
        seed: int = 0,
        mesh: Mesh | None = None,
        console: Console | None = None,
    ):
        self.console = console
        self.tokenizer, self.reward, self.mesh = tokenizer, reward, mesh
        self.ends = np.asarray(sampler.eos_id)
        self.penalty = 0.0 if missing_eos_penalty is None else missing_eos_penalty
        self.everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())

        def draw(params: Params, batch: Batch, stream: int, step: int, copies: int) -> Any:
            tokens, mask = (
                jnp.concatenate([batch[name]] * copies) for name in ("prompt_tokens", "prompt_mask")
            )
            key = jax.random.key(seed)
            for number in (stream, step):
                key = jax.random.fold_in(key, number)
            numbers = jnp.concatenate([copies * batch["number"] + one for one in range(copies)])
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
            samples = sampler(params, tokens, mask, keys)
            return samples.tokens, samples.mask

        # Every process decodes its own rows, wherever the device has put them.
        self._draw = jax.jit(draw, static_argnames="copies", out_shardings=self.everywhere)

    def sample(
        self,
        params: Params,
        batch: Batch,
        step: int,
        *,
        stream: int = _TRAINING,
        copies: int = ANSWERS,
    ) -> Sampled:
        """``copies`` answers to every prompt of a batch, scored.

        The batch has ``prompt_tokens``, ``prompt_mask`` ``[rows, width]``, ``record`` ``[rows]`` and
        ``number`` int32 ``[rows]``. A row's draws depend on its number, on ``step``, the number of
        steps done, and on ``stream``. Raises `UserError` where the reward gives no finite number for
        each answer.
        """
        names = ("prompt_tokens", "prompt_mask", "number")
        given = put_batch({name: batch[name] for name in names}, self.mesh)
        drawn = self._draw(params, given, np.int32(stream), np.int32(step), copies=copies)
        tokens, mask = (self._own_rows(np.asarray(one), copies) for one in drawn)
        ended = np.any(np.isin(tokens, self.ends) & mask, axis=1)
        ids = [row[used].tolist() for row, used in zip(tokens, mask, strict=True)]
        records = list(batch["record"]) * copies
        answers = Answers(
            prompts=[normalise_prompt(record) for record in records],
            completions=self.tokenizer.batch_decode(ids, skip_special_tokens=True),
            completion_ids=ids,
            records=records,
        )
        scores = self._agree_on_shared_rows(self.reward(answers), copies)
        if self.penalty:
            scores = scores - self.penalty * ~ended
        return Sampled(tokens, mask, ended, scores, answers.completions)

    def pairs(
        self, params: Params, batch: Batch, step: int, *, share: bool
    ) -> dict[str, np.ndarray]:
        """A preference batch of the policy's own answers to prompts, from `tokenize_prompts`.

        With `share` a prompt is computed once for both answers (`train.data.layout.share_prompt`). Of
        two answers with the same score the first one is chosen, as in TRL. The batch has the columns
        that `train.objectives.preference.preference_loss` reads, but for the reference's, and
        ``chosen_scores``, ``rejected_scores``, ``chosen_ended``, ``rejected_ended`` float32
        ``[rows]``, which `with_objectives` reads.
        """
        number = row_numbers(len(batch["index"]), self.mesh)
        found = self.sample(params, {**batch, "number": number}, step)
        order = rank(found.scores)
        pairs = {name: batch[name] for name in ("prompt_tokens", "prompt_mask", "index")}
        for name, which in zip(_NAMES, order, strict=True):
            pairs[f"{name}_tokens"], pairs[f"{name}_mask"] = found.tokens[which], found.mask[which]
            pairs[f"{name}_scores"] = found.scores[which].astype(np.float32)
            pairs[f"{name}_ended"] = found.ended[which].astype(np.float32)
        prompt, new = batch["prompt_tokens"].shape[1], found.tokens.shape[1]
        widths = Widths(prompt, new, prompt + ANSWERS * new, ANSWERS * new)
        return share_prompt(pairs, widths) if share else pairs

    def evaluate(self, dataset: TokenDataset, batch_size: int, figures: Figures) -> Evaluate:
        """Makes ``f(params)``: one answer to every held-out prompt, from the same draws every time.

        Its metrics are ``eval_NAME`` for every figure, the mean over the prompts that have one.
        """

        def evaluate(params: Params) -> dict[str, float]:
            found: list[Mapping[str, np.ndarray]] = []
            for number, (rows, batch) in enumerate(bucketed_batches(dataset, batch_size)):
                sampled = self.sample(
                    params, {**batch, "number": batch["index"]}, 0, stream=_HELD_OUT, copies=1
                )
                of_all = figures(sampled)
                found.append({name: values[: len(rows)] for name, values in of_all.items()})
                if number == 0:
                    scores = next(iter(found[0].values()))[:_SHOWN]
                    self._show(batch["record"], sampled.texts, scores)
            together = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
            return {
                f"eval_{name}": float(values[~np.isnan(values)].mean())
                for name, values in together.items()
                if not np.isnan(values).all()
            }

        return evaluate

    def _show(self, records: np.ndarray, texts: Sequence[str], scores: np.ndarray) -> None:
        if self.console is None:
            return
        for record, text, score in zip(records, texts, scores, strict=False):
            prompt = normalise_prompt(record)
            asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            line = f"{asked!r} → {text!r}, score {score:.4g}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def columns(
        self, score: Score, params: Params, batch: Batch, names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """A model's scores of this process's rows, float32; `score` is from `replicated`."""
        scores = score(params, put_batch(batch, self.mesh))
        return {
            name: self._own_rows(np.asarray(one)) for name, one in zip(names, scores, strict=True)
        }

    def of_all_processes(self, rows: np.ndarray) -> np.ndarray:
        """Puts numbers of this process's prompts, ``[prompts, …]``, beside all others'; float32."""
        rows = rows.astype(np.float32)
        parts, count = row_parts(self.mesh)
        return rows if len(parts) == count else fetch(put_batch({"": rows}, self.mesh))[""]

    def replicated(self, score: Score) -> Score:
        """A function of parameters and batch, compiled so that every process has all its results."""
        return jax.jit(score, out_shardings=self.everywhere)

    def _agree_on_shared_rows(self, scores: np.ndarray, copies: int) -> np.ndarray:
        """One score for each answer where several processes have it, as a reward may be a judge."""
        by_prompt = np.stack(np.split(scores, copies), axis=1)
        return np.concatenate(np.moveaxis(agree_on_shared_rows(by_prompt, self.mesh), 1, 0))

    def _own_rows(self, rows: np.ndarray, copies: int = 1) -> np.ndarray:
        """This process's rows of every copy of a global batch."""
        return np.concatenate([own_rows(copy, self.mesh) for copy in np.split(rows, copies)])


def pair_figures(found: Sampled) -> dict[str, np.ndarray]:
    """The figures that online DPO reports of held-out answers."""
    return {
        "objective/scores": found.scores,
        "val/contain_eos_token": found.ended,
        "completions/mean_length": found.mask.sum(axis=1),
    }


def rank(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the chosen and of the rejected answers, each int ``[prompts]``.

    The two answers to prompt ``i`` have their scores at ``i`` and ``i + prompts``.

    Example:
        >>> chosen, rejected = rank(np.array([1.0, 0.0, 0.5, 2.0]))
        >>> chosen.tolist(), rejected.tolist()
        ([0, 3], [2, 1])
    """
    first, second = np.split(np.arange(len(scores)), ANSWERS)
    better = scores[first] >= scores[second]
    return np.where(better, first, second), np.where(better, second, first)


def with_objectives(loss: BatchLoss, *, beta: float, has_reference: bool) -> BatchLoss:
    """A loss on preference batches that also reports what TRL's online trainer does.

    It reports `objective/scores` (mean over all answers), `objective/scores_margin`, `objective/ties`
    (share of pairs with equal scores, which teach nothing about the reward), `val/contain_eos_token`
    and `completions/mean_length`. Where batches have the reference's log-probabilities, it also
    reports `objective/entropy` (minus the mean log-probability of an answer), `objective/kl` (in
    nats, the mean over answers of the log-ratio of policy and reference),
    `objective/non_score_reward` (−β times that) and `objective/rlhf_reward` (scores plus that).
    ``beta`` is that of the loss, where its metrics have none.
    """

    def mean(columns: Sequence[jax.Array]) -> jax.Array:
        return jnp.mean(jnp.stack(columns))

    def loss_with_objectives(params: Any, batch: Batch) -> tuple[Any, Metrics]:
        terms, found = loss.loss_fn(params, batch)
        chosen, rejected = (batch[f"{name}_scores"] for name in _NAMES)
        lengths = [jnp.sum(batch[f"{name}_mask"], axis=1, dtype=jnp.float32) for name in _NAMES]
        metrics = {
            "beta": jnp.float32(beta),
            **found,
            "objective/scores": mean([chosen, rejected]),
            "objective/scores_margin": jnp.mean(chosen - rejected),
            "objective/ties": jnp.mean((chosen == rejected).astype(jnp.float32)),
            "val/contain_eos_token": mean([batch[f"{name}_ended"] for name in _NAMES]),
            "completions/mean_length": mean(lengths),
        }
        if has_reference:
            entropy = -mean([metrics["logps/chosen"], metrics["logps/rejected"]])
            kl = -entropy - mean([batch[f"reference_{name}_logps"] for name in _NAMES])
            penalty = -metrics["beta"] * kl
            metrics |= {
                "objective/entropy": entropy,
                "objective/kl": kl,
                "objective/non_score_reward": penalty,
                "objective/rlhf_reward": metrics["objective/scores"] + penalty,
            }
        return terms, metrics

    return replace(loss, loss_fn=loss_with_objectives)
