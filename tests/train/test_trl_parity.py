"""Twenty steps of TRL's trainers of DPO and KTO and of ours on the same tiny model and records."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch
import transformers
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from train.data import make_loader, tokenize_preference, tokenize_unpaired
from train.data.mismatched import with_kl_completions
from train.losses import (
    PreferenceLoss,
    UnpairedLoss,
    check_starts_at_reference,
    check_unpaired_start,
)
from train.models import from_hf, split_model
from train.objectives.preference import preference_loss, reference_logps_fn
from train.objectives.unpaired import unpaired_logps_fn, unpaired_loss
from train.training.step import init_state, make_train_step

STEPS, BATCH, BETA = 20, 4, 0.1
# Adam divides by sqrt(v) + eps, so a gradient's rounding moves a parameter by up to
# lr * rounding / eps a step. Some gradients are rounding noise (those of key biases) or nearly so, and
# the rounding depends on the processor and the versions. This eps is far above it and still small next
# to the gradients that train the model, so the final parameters have a tight limit on any machine.
B1, B2, EPS = 0.9, 0.999, 1e-4
FINAL_LIMIT = 2e-6
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.1, 1.0


@pytest.fixture(autouse=True)
def _one_torch_thread():
    """Threads cost more than they bring on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_records() -> list[dict[str, str]]:
    """Forty preferences of different lengths, two epochs of ten batches."""
    rng = np.random.default_rng(0)
    words = "the capital of France is Paris Rome Italy blue green red two plus three"

    def text(most: int) -> str:
        return " ".join(rng.choice(words.split(), rng.integers(1, most)))

    return [
        {"prompt": text(9) + ":", "chosen": " " + text(12), "rejected": " " + text(12)}
        for _ in range(BATCH * STEPS // 2)
    ]


def make_model(kind: str, vocab_size: int) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "attention_dropout": 0.0,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**shape, tie_word_embeddings=False)
        return transformers.LlamaForCausalLM(config)
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**shape, tie_word_embeddings=True)
    )


class Recording:
    """Mixed into TRL's trainers: keeps what they saw and computed."""

    def __init__(self, *args, **kwargs):
        self.losses, self.batches, self.norms = [], [], []
        self.first_gradients = {}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append(loss.item())
        self.batches.append({name: value.clone() for name, value in inputs.items()})
        return loss

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        squares = sum(g.double().square().sum() for g in gradients.values())
        self.norms.append(float(squares) ** 0.5)
        if not self.first_gradients:
            self.first_gradients = {name: g.clone() for name, g in gradients.items()}
        return loss


class RecordingDPO(Recording, DPOTrainer):
    pass


class RecordingKTO(Recording, KTOTrainer):
    pass


def run_trl(model, tokenizer, records, loss_type, directory) -> Recording:
    is_kto = loss_type == "kto"
    config = (KTOConfig if is_kto else DPOConfig)(
        output_dir=str(directory),
        loss_type=loss_type,
        beta=BETA,
        max_length=None,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=B1,
        adam_beta2=B2,
        adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = (RecordingKTO if is_kto else RecordingDPO)(
        model=model,
        ref_model=copy.deepcopy(model),
        args=config,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def as_params(model, tensors, directory: Path):
    """Named torch tensors as our parameter tree, by way of a Hugging Face directory."""
    carrier = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in carrier.named_parameters():
            parameter.copy_(tensors[name])
    carrier.save_pretrained(directory)
    return split_model(from_hf(directory))


def assert_close(ours, theirs, tolerance):
    """No entry differs by more than `tolerance` of the largest magnitude in the tree."""
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        error = float(np.abs(np.asarray(a) - np.asarray(b)).max()) / largest
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e}"


def assert_same_metrics(ours, trainer, number):
    """Loss, gradient norm and TRL's metrics of one step within 1e-5.

    A reward is a difference of log-probabilities, which cancel down to nothing while the policy is
    near the reference: it is exact to 1e-5 of itself or to 2e-6 of what it is a difference of.
    """
    logged = trainer.state.log_history[number]
    np.testing.assert_allclose(ours["loss"], trainer.losses[number], rtol=1e-5)
    np.testing.assert_allclose(ours["grad_norm"], trainer.norms[number], rtol=1e-5)
    for which in ("chosen", "rejected"):
        np.testing.assert_allclose(ours[f"logps/{which}"], logged[f"logps/{which}"], rtol=1e-5)
    resolution = 2e-6 * BETA * abs(logged["logps/chosen"])
    for name in ("chosen", "rejected", "margins"):
        name = f"rewards/{name}"
        np.testing.assert_allclose(ours[name], logged[name], rtol=1e-5, atol=resolution)
    if "kl" in logged:
        np.testing.assert_allclose(ours["kl"], logged["kl"], rtol=1e-5, atol=resolution / BETA)
    else:
        assert ours["rewards/accuracies"] == logged["rewards/accuracies"]


def trl_rows(batch):
    """Kinds of answers in TRL's batch, each row by row, with tokens and masks."""
    found = []
    for prefix, names in (("", ("chosen", "rejected")), ("KL_", ("kl",))):
        if f"{prefix}input_ids" in batch:
            parts = ("input_ids", "attention_mask", "completion_mask")
            found.append((names, [batch[f"{prefix}{part}"].numpy() for part in parts]))
    if "label" in batch:
        found[0] = (("completion",), found[0][1])
    return found


def assert_same_tokens(batch, names, tokens, attention, completions):
    """The unpadded tokens and completion masks of a batch are TRL's."""
    assert len(tokens) == len(names) * BATCH
    for row in range(len(tokens)):
        name, source = names[row // BATCH], row % BATCH
        prompt = batch["prompt_tokens"][source][batch["prompt_mask"][source]]
        answer = batch[f"{name}_tokens"][source][batch[f"{name}_mask"][source]]
        kept = attention[row].astype(bool)
        np.testing.assert_array_equal(tokens[row][kept], np.concatenate([prompt, answer]))
        assert completions[row].sum() == len(answer)


def is_decayed(params):
    """transformers decays everything but biases and norms."""

    def decayed(path, _):
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(decayed, params)


def assert_same_steps(trainer, model, directory, loss_fn, params, dataset, check_first):
    """Twenty of our steps against those that TRL's trainer recorded, from `params` to the end."""
    tx = optax.chain(
        optax.clip_by_global_norm(MAX_GRAD_NORM),
        optax.adamw(LEARNING_RATE, B1, B2, EPS, weight_decay=WEIGHT_DECAY, mask=is_decayed),
    )
    batches = make_loader(dataset, BATCH, shuffle=False)
    gradients = jax.jit(jax.grad(loss_fn, has_aux=True))(params, next(batches))[0]
    expected = as_params(model, trainer.first_gradients, directory / "gradients")[1]
    assert_close(gradients, expected, 1e-5)

    state, step = init_state(params, tx), make_train_step(loss_fn, tx)
    batches = make_loader(dataset, BATCH, shuffle=False)
    for number in range(STEPS):
        batch = next(batches)
        for names, rows in trl_rows(trainer.batches[number]):
            assert_same_tokens(batch, names, *rows)
        state, metrics = step(state, batch)
        metrics = jax.tree.map(float, metrics)
        if number == 0:
            check_first(metrics)
        assert_same_metrics(metrics, trainer, number)
    final = {name: value.detach() for name, value in model.named_parameters()}
    assert_close(state["params"], as_params(model, final, directory / "final")[1], FINAL_LIMIT)


@pytest.mark.parametrize(
    ("kind", "loss_type"),
    [
        ("llama", "sigmoid"),
        pytest.param("qwen2", "ipo", marks=pytest.mark.slow),
        pytest.param("llama", "hinge", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_agree_with_trl(kind, loss_type, plain_tokenizer, tmp_path):
    records = make_records()
    model = make_model(kind, len(plain_tokenizer))
    initial = {name: value.clone() for name, value in model.named_parameters()}
    trainer = run_trl(model, plain_tokenizer, records, loss_type, tmp_path / "trl")

    graphdef, params = as_params(model, initial, tmp_path / "initial")
    dataset = tokenize_preference(
        records, plain_tokenizer, max_prompt_length=512, max_completion_length=512
    )
    whole = next(make_loader(dataset, len(dataset), shuffle=False))
    chosen, rejected = reference_logps_fn(graphdef)(params, whole)
    dataset = dataset.with_columns(
        reference_chosen_logps=np.asarray(chosen), reference_rejected_logps=np.asarray(rejected)
    )

    loss = PreferenceLoss(loss_type, beta=BETA)
    loss_fn = preference_loss(graphdef, loss)
    check = partial(check_starts_at_reference, loss=loss, tolerance=1e-6)
    assert_same_steps(trainer, model, tmp_path, loss_fn, params, dataset, check)


def test_twenty_steps_of_kto_agree_with_trl(plain_tokenizer, tmp_path):
    records = [
        {"prompt": r["prompt"], "completion": r["chosen"], "label": bool(n % 3)}
        for n, r in enumerate(make_records())
    ]
    model = make_model("llama", len(plain_tokenizer))
    initial = {name: value.clone() for name, value in model.named_parameters()}
    trainer = run_trl(model, plain_tokenizer, records, "kto", tmp_path / "trl")

    graphdef, params = as_params(model, initial, tmp_path / "initial")
    dataset = tokenize_unpaired(
        records, plain_tokenizer, max_prompt_length=512, max_completion_length=512
    )
    dataset = with_kl_completions(dataset, BATCH)
    whole = next(make_loader(dataset, len(dataset), shuffle=False))
    names = "completion", "kl"
    logps = unpaired_logps_fn(graphdef, names)(params, whole)
    dataset = dataset.with_columns(
        **{f"reference_{n}_logps": np.asarray(x) for n, x in zip(names, logps, strict=True)}
    )
    loss_fn = unpaired_loss(graphdef, UnpairedLoss(beta=BETA))
    check = partial(check_unpaired_start, beta=BETA, tolerance=1e-5)
    assert_same_steps(trainer, model, tmp_path, loss_fn, params, dataset, check)
    assert max(row.get("kl", 0) for row in trainer.state.log_history) > 0.1
