"""The two sides of the comparison with TRL, each alone in its process.

``python -m tests.bench.trl_sides SIDE SETTINGS.json`` sets everything up, then runs one epoch for
every line that it reads and answers each with a line of JSON. So two sides can take turns on one
machine while neither is imported, compiled or warmed up twice.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
Epochs = Iterator[int]
"""Each `next` trains one epoch and gives its number of steps."""


def omerge_epochs(settings: Settings) -> Epochs:
    """Epochs of this package's DPO step, set up as `python -m train dpo` does."""
    import jax
    import numpy as np
    import optax
    from transformers import AutoTokenizer

    from train.config import DataOptions
    from train.data import make_buckets, make_loader, read_records, tokenize_preference
    from train.distributed.batches import put_batch
    from train.evaluation.held_out import answer_logps
    from train.inputs.records import sharing_prompts
    from train.models import from_hf, split_model
    from train.objectives.preference import preference_loss, reference_logps_fn
    from train.training.step import init_state, make_train_step

    size = settings["batch_size"]
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    data = tokenize_preference(
        read_records(settings["data"]),
        tokenizer,
        max_prompt_length=settings["max_length"],
        max_completion_length=settings["max_length"],
    )
    data = sharing_prompts(data, DataOptions(path=settings["data"]))
    on_gpu = settings["device"] == "gpu"
    model = from_hf(
        settings["model"],
        dtype="bfloat16" if on_gpu else "float32",
        param_dtype="float32",
        attention=settings["attention"],
    )
    graphdef, params = split_model(model)
    score = reference_logps_fn(graphdef)
    chosen, rejected = answer_logps(score, params, data, size, None)
    data = data.with_columns(reference_chosen_logps=chosen, reference_rejected_logps=rejected)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(settings["learning_rate"], weight_decay=0.0)
    )
    state, step = init_state(params, tx), make_train_step(preference_loss(graphdef), tx)
    del params, model
    loader = make_loader(data, size, buckets=make_buckets(data, size))
    metrics: dict[str, Any] = {}
    while True:
        losses = []
        for _ in range(len(data) // size):
            state, metrics = step(state, put_batch(next(loader), None))
            losses.append(metrics["loss"])
        assert np.isfinite(jax.device_get(losses)).all()
        yield len(data) // size


def trl_epochs(settings: Settings) -> Callable[[Callable[[], None], Callable[[int], None]], None]:
    """TRL's `DPOTrainer` on the same pairs, with everything that makes it faster on a CPU.

    Its own loop calls back, so this gives a function of what to call before and after an epoch.
    """
    import torch
    from transformers import TrainerCallback

    on_gpu = settings["device"] == "gpu"
    trainer = _trl_trainer(settings, on_gpu)

    def train(before: Callable[[], None], after: Callable[[int], None]) -> None:
        class Turns(TrainerCallback):
            done = 0

            def on_epoch_begin(self, *_: Any, **__: Any) -> None:
                before()

            def on_epoch_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                if on_gpu:
                    torch.cuda.synchronize()
                after(state.global_step - self.done)
                self.done = state.global_step

        trainer.add_callback(Turns())
        trainer.train()

    return train


def _trl_trainer(settings: Settings, on_gpu: bool) -> Any:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from train.data import read_records

    records = [dict(record) for record in read_records(settings["data"])]
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    config = DPOConfig(
        output_dir=str(Path(settings["directory"]) / "trl"),
        per_device_train_batch_size=settings["batch_size"],
        num_train_epochs=settings["epochs"],
        learning_rate=settings["learning_rate"],
        max_length=2 * settings["max_length"],
        precompute_ref_log_probs=True,
        train_sampling_strategy=settings["trl_sampling"],
        remove_unused_columns=False,  # keeps the column that rows are grouped by
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_drop_last=True,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
    )
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype="float32", attn_implementation="sdpa"
        ),
        args=config,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
    )


class _Turns:
    """Waits for a line, times the epoch that follows, and answers with its figures."""

    def __init__(self, answers: Any, peak: Callable[[], float]) -> None:
        self.answers, self.peak, self.start, self.worked = answers, peak, 0.0, 0.0

    def before(self) -> None:
        if not sys.stdin.readline().strip():
            raise SystemExit
        self.start, self.worked = time.perf_counter(), time.process_time()

    def after(self, steps: int) -> None:
        seconds, worked = time.perf_counter() - self.start, time.process_time() - self.worked
        figures = {"seconds": seconds, "cpu_seconds": worked, "steps": steps}
        figures["peak_mib"] = self.peak() / 2**20
        self.say(figures)

    def say(self, value: Any) -> None:
        print(json.dumps(value), file=self.answers, flush=True)


def _resident() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of(side: str) -> Callable[[], float]:
    """A function that gives the most bytes that a side's arrays had on the GPU at once."""
    if side == "trl":
        import torch

        return torch.cuda.max_memory_allocated
    import jax

    return lambda: (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"]


def main(side: str, settings_file: str) -> None:
    """Runs one side until its input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    settings = json.loads(Path(settings_file).read_text())
    turns = _Turns(answers, peak_of(side) if settings["device"] == "gpu" else _resident)
    if side == "trl":
        train = trl_epochs(settings)
        turns.say("ready")
        train(turns.before, turns.after)
        return
    epochs = omerge_epochs(settings)
    turns.say("ready")
    while True:
        turns.before()
        turns.after(next(epochs))


if __name__ == "__main__":
    main(*sys.argv[1:])
