"""The training step: one `jax.jit` over a plain dict of parameters, optimizer state and counter.

Nothing here reads a value back from the device, so the host can prepare the next batch while a step
runs. The model is rebuilt from its graph definition inside the trace (`nnx.merge`), which costs
nothing at run time; the modules themselves never cross a `jit` boundary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import omerge_jax as om
from train import losses
from train.accumulate import Parted, columns_in_parts, loss_and_gradient
from train.averages import Followers
from train.logps import completion_logps, completion_statistics
from train.trainable import join, with_frozen

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
State = dict[str, Any]
LossFn = Callable[[Any, Batch], tuple[jax.Array, Metrics]]
VocabChunk = int | None | Literal["auto"]

AUTO_VOCAB_CHUNK = 8192
"""Columns of the vocabulary that `vocab_chunk="auto"` holds at a time."""


def resolve_vocab_chunk(vocab_chunk: VocabChunk, vocab_size: int) -> int | None:
    """The chunk that a setting means for a vocabulary.

    `"auto"` computes all logits at once up to `2 * AUTO_VOCAB_CHUNK` tokens, where they are no
    larger than the other activations, and `AUTO_VOCAB_CHUNK` columns at a time above: a third more
    work in the output projection buys that no `[batch, length, vocabulary]` array exists. On a CPU
    that is faster too (49k tokens, 1024 positions, width 576: 3.0 s instead of 5.4 s with the
    gradient), because a chunk stays near the caches.
    """
    if vocab_chunk != "auto":
        return vocab_chunk
    return AUTO_VOCAB_CHUNK if vocab_size > 2 * AUTO_VOCAB_CHUNK else None


def _pair_token_logps(model: Any, batch: Batch, vocab_chunk: VocabChunk) -> jax.Array:
    """Per-token logps of both completions, `[2 * batch, completion]`, from one forward pass."""
    unembedding = model.unembedding()
    return completion_logps(
        model,
        jnp.concatenate([batch["prompt_tokens"]] * 2),
        jnp.concatenate([batch["prompt_mask"]] * 2),
        jnp.concatenate([batch["chosen_tokens"], batch["rejected_tokens"]]),
        jnp.concatenate([batch["chosen_mask"], batch["rejected_mask"]]),
        vocab_chunk=resolve_vocab_chunk(vocab_chunk, unembedding.shape[1]),
    )


def preference_loss(
    graphdef: nnx.GraphDef,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    vocab_chunk: VocabChunk = "auto",
) -> LossFn:
    """A DPO-family loss on preference batches with cached reference log-probabilities.

    Args:
      graphdef: The model's structure, from `train.models.split_model`.
      loss_type: A name in `train.losses.LOSSES`.
      beta: Strength of the pull towards the reference model.
      label_smoothing: Probability that a label is flipped; only for `"sigmoid"`.
      vocab_chunk: See `resolve_vocab_chunk`.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)`: the mean loss over the pairs, float32, and
      `loss` and the metrics of `losses.pair_metrics`. `batch` holds `prompt_tokens`, `prompt_mask`
      `[B, P]`, `chosen_tokens`, `chosen_mask`, `rejected_tokens`, `rejected_mask` `[B, C]`,
      `reference_chosen_logps` and `reference_rejected_logps` `[B]`.

    Raises:
      ValueError: For an unknown loss or a setting out of range, before anything is traced.
    """
    loss_of_pair = losses.pair_loss(loss_type, beta=beta, label_smoothing=label_smoothing)

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        logps = _pair_token_logps(nnx.merge(graphdef, params), batch, vocab_chunk)
        chosen, rejected = jnp.split(jnp.sum(logps, axis=1), 2)
        pair = losses.PairLogps(
            chosen,
            rejected,
            batch["reference_chosen_logps"],
            batch["reference_rejected_logps"],
            jnp.sum(batch["chosen_mask"], axis=1, dtype=jnp.float32),
            jnp.sum(batch["rejected_mask"], axis=1, dtype=jnp.float32),
        )
        loss = jnp.mean(loss_of_pair(pair))
        return loss, {"loss": jax.lax.stop_gradient(loss), **losses.pair_metrics(pair, beta)}

    return loss_fn


def sft_loss(graphdef: nnx.GraphDef, *, vocab_chunk: VocabChunk = "auto") -> LossFn:
    """Cross-entropy on the completion tokens of SFT batches, averaged over the batch's tokens.

    Args:
      graphdef: The model's structure, from `train.models.split_model`.
      vocab_chunk: See `resolve_vocab_chunk`.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)` with the metrics of `losses.sft`. `batch` holds
      `prompt_tokens`, `prompt_mask` `[B, P]`, `completion_tokens` and `completion_mask` `[B, C]`.
    """

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        model = nnx.merge(graphdef, params)
        mask = batch["completion_mask"]
        logps, top1 = completion_statistics(
            model,
            batch["prompt_tokens"],
            batch["prompt_mask"],
            batch["completion_tokens"],
            mask,
            vocab_chunk=resolve_vocab_chunk(vocab_chunk, model.unembedding().shape[1]),
        )
        return losses.sft(logps, mask, top1)

    def masses(batch: Batch) -> dict[str, jax.Array]:
        tokens = jnp.sum(batch["completion_mask"], dtype=jnp.float32)
        return {"loss": tokens, "mean_token_accuracy": tokens}

    return Parted(loss_fn, masses=masses, sums=("num_tokens",))


def reference_logps_fn(
    graphdef: nnx.GraphDef, *, vocab_chunk: VocabChunk = "auto"
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted `f(params, batch) -> (chosen_logps, rejected_logps)`, each float32 `[B]`.

    It scores a batch exactly as `preference_loss` does, so a policy that has not moved has rewards
    of zero. `batch` needs no reference log-probabilities.
    """

    @jax.jit
    def reference_logps(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logps = _pair_token_logps(nnx.merge(graphdef, params), batch, vocab_chunk)
        chosen, rejected = jnp.split(jnp.sum(logps, axis=1), 2)
        return chosen, rejected

    return reference_logps


def state_shardings(state: Any, params: Any) -> Any:
    """Where every array of a training state belongs when `params` are spread over a mesh.

    A leaf of the state takes the sharding of the parameter whose key path its own path ends with
    and whose shape it has (moments, task vectors, the parameters themselves); anything else, such
    as counters, is replicated.

    Args:
      state: A training state of arrays or `jax.ShapeDtypeStruct`, as `init_state` makes.
      params: The parameters, with `jax.sharding.NamedSharding`.

    Returns:
      A tree of shardings shaped like `state`; `None` when `params` are not on a mesh.
    """
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    by_path = {_key_names(path): leaf for path, leaf in paths}
    meshes = {
        leaf.sharding.mesh
        for leaf in by_path.values()
        if isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding)
    }
    if not meshes:
        return None
    replicated = jax.sharding.NamedSharding(meshes.pop(), jax.sharding.PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
        names = _key_names(path)
        for start in range(len(names)):
            parameter = by_path.get(names[start:])
            if parameter is not None and parameter.shape == leaf.shape:
                return parameter.sharding
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)


def _key_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def init_state(
    params: Any,
    tx: optax.GradientTransformation,
    delta: Any = None,
    followers: Followers | None = None,
) -> State:
    """Start a run: a copy of the parameters, the optimizer's state, and step 0.

    Every array of the state is its own buffer, because the step donates them: `params` and `delta`
    stay valid, and are freed when the caller lets go of them.

    Args:
      params: Parameters, a tree of arrays. On a mesh, the optimizer state follows their shardings.
      tx: The optimizer.
      delta: Task vector for its online merge, set through `omerge_jax.with_delta`; `None` when
        the optimizer has no use for one.
      followers: Copies of the parameters to hold besides.

    Returns:
      `{"params", "opt_state", "step"}`, and `"ema"` and `"reference"` of the followers; `step` is an
      int32 scalar.
    """
    copies = Followers() if followers is None else followers

    def init(params: Any, delta: Any) -> State:
        opt_state: Any = tx.init(params)
        if delta is not None:
            opt_state = om.with_delta(opt_state, delta)
        state = {"params": params, "opt_state": opt_state, "step": jnp.zeros([], jnp.int32)}
        state |= copies.init(params)
        # Without the copy, jit hands an input that is returned as it is back as the same buffer.
        return jax.tree.map(jnp.copy, state)

    shardings = state_shardings(jax.eval_shape(init, params, delta), params)
    return jax.jit(init, out_shardings=shardings)(params, delta)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    shardings: Any = None,
    accumulate: int = 1,
    followers: Followers | None = None,
    reference_columns: Callable[[Any, Batch], Batch] | None = None,
) -> Callable[..., tuple[State, Metrics]]:
    """The jitted `step(state, batch, frozen={}) -> (state, metrics)`; it consumes the state.

    Args:
      loss_fn: `loss_fn(params, batch) -> (loss, metrics)`, or a `train.accumulate.Parted`.
      tx: The optimizer `state` was made with.
      shardings: Where the new state belongs, from `state_shardings`; needed on a mesh so that a
        state keeps its layout from step to step.
      accumulate: Parts in which the batch is looked at, one after the other, see
        `train.accumulate.loss_and_gradient`.
      followers: As given to `init_state`.
      reference_columns: `f(params, batch)`: columns of a batch that come from the reference. Needed
        where the state holds a reference, whose parameters it is then given at every step.

    Returns:
      A function of a state, a batch and the parameters that are not trained, a nested dict that
      belongs beside `state["params"]`. Its metrics are float32 scalars on the device: `loss`,
      `grad_norm` (global norm before any clipping), those of `loss_fn`, and `merge/<name>` for every
      scalar of `omerge_jax.merge_metrics` when the optimizer merges.
    """
    tx = optax.with_extra_args_support(tx)
    copies = Followers() if followers is None else followers

    def step(state: State, batch: Batch, frozen: Any = None) -> tuple[State, Metrics]:
        frozen = {} if frozen is None else frozen
        of_trained: Any = with_frozen(loss_fn, frozen) if frozen else loss_fn
        if "reference" in state:
            assert reference_columns is not None
            reference = join(state["reference"], frozen)
            known = columns_in_parts(reference_columns, reference, batch, accumulate)
            batch = {**batch, **jax.lax.stop_gradient(known)}
        gradient = loss_and_gradient(of_trained, accumulate)
        (loss, metrics), grads = gradient(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        merge = {f"merge/{name}": value for name, value in om.merge_metrics(opt_state).items()}
        metrics = {"loss": loss, "grad_norm": _global_norm(grads), **metrics, **merge}
        count = state["step"] + 1
        new_state = {"params": params, "opt_state": opt_state, "step": count}
        new_state |= copies.update(state, params, count)
        return new_state, jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), metrics)

    out_shardings = None if shardings is None else (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def _global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, summed in float32 whatever their dtype."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros([], jnp.float32)))


def check_starts_at_reference(
    metrics: Mapping[str, Any],
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    tolerance: float = 1e-2,
) -> None:
    """Refuse a preference run whose policy is not the reference it is compared with.

    Before the first update every reward is 0 and the loss is the one of a zero margin: ln 2 for
    `sigmoid`, `1 / (4 β²)` for `ipo`, 1 for `hinge`. Anything else means that the cached reference
    log-probabilities belong to another model, other data or another template.

    Args:
      metrics: Metrics of the first step of a fresh run, or of an evaluation before it.
      loss_type: The loss that made them.
      beta: Its beta.
      tolerance: Largest deviation of a mean reward from 0, and of the loss relative to its
        expected value. The default leaves room for bfloat16.

    Raises:
      ValueError: Naming every figure that is off.
    """
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    pair = losses.PairLogps(*map(jnp.asarray, (zero, zero, zero, zero, one, one)))
    expected = float(losses.pair_loss(loss_type, beta=beta)(pair)[0])
    wrong = [
        f"{name} = {float(metrics[name]):.6g} instead of 0"
        for name in ("rewards/chosen", "rewards/rejected")
        if not abs(float(metrics[name])) <= tolerance
    ]
    loss = float(metrics["loss"])
    if not math.isclose(loss, expected, rel_tol=tolerance):
        wrong.insert(0, f"loss = {loss:.6g} instead of {expected:.6g}")
    if wrong:
        raise ValueError(
            f"The policy does not start at the reference model: {'; '.join(wrong)}. The reference "
            "log-probabilities were computed with another model, another data set or another "
            "tokenisation; delete the cached ones and start again."
        )
