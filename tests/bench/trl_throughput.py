"""Throughput and memory next to TRL: ``python -m tests.bench.trl_throughput``.

The same model, pairs, batch size and optimizer settings, on the CPU in float32 or on a GPU in
bfloat16 with float32 parameters. Each side runs in its own process and they take turns, an epoch
each, so that what else the machine does meets both; the fastest epoch of each counts. The first
epoch of either is not counted: it compiles, or warms up.

Both sides are credited with the same useful tokens: those of the prompt and an answer, for both
answers of every pair, without padding. That one side computes a prompt once does not change what it
is credited with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END, START = "<|im_end|>", "<|im_start|>"


def make_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of made-up words whose lengths are spread as in chats: many short, few long."""
    random = np.random.default_rng(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u")]
    words = ["".join(random.choice(syllables, 2)) for _ in range(2000)]

    def text(median: int) -> str:
        length = int(np.clip(random.lognormal(np.log(median), 0.8), 1, 250))
        return " ".join(random.choice(words, length))

    return [
        {
            "prompt": [{"role": "user", "content": text(50)}],
            "chosen": text(40),
            "rejected": text(40),
        }
        for _ in range(count)
    ]


def write_model(directory: Path, texts: Sequence[str], args: argparse.Namespace) -> int:
    """A random Qwen2 with a byte-level BPE of the texts. Returns its number of parameters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary,
        special_tokens=[START, END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
    config = Qwen2Config(
        vocab_size=max(args.vocabulary, args.embedding_rows or 0),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate or 8 * args.hidden // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=bpe.token_to_id(END),
        pad_token_id=bpe.token_to_id(END),
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    return model.num_parameters()


def usable_pairs(
    args: argparse.Namespace, directory: Path
) -> tuple[list[dict[str, Any]], int, int]:
    """Pairs that neither side truncates or drops, as messages.

    Returns:
      The pairs, the parameters of the model that was written, and the useful tokens of all pairs.
    """
    from transformers import AutoTokenizer

    from train.data import normalise_preference, read_records, tokenize_preference
    from train.data.records import UnusableRecord

    found = make_records(3 * args.pairs) if args.data is None else read_records(args.data)
    records = []
    for number in np.random.default_rng(0).permutation(len(found)):
        try:
            pair = normalise_preference(found[number])
        except UnusableRecord:
            continue
        records.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected})
    texts = [
        str(message["content"]) for one in records for part in one.values() for message in part
    ]
    parameters = write_model(directory, texts, args)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    kept, tokens = [], 0
    for record in records:
        limits: dict[str, Any] = {"max_prompt_length": 8192, "max_completion_length": 8192}
        row = tokenize_preference([record], tokenizer, **limits).arrays
        prompt, chosen, rejected = (
            int(row[f"{name}_mask"].sum()) for name in ("prompt", "chosen", "rejected")
        )
        if max(prompt, chosen, rejected) < args.max_length and len(kept) < args.pairs:
            # What TRL groups rows by: the longer of its two sequences.
            kept.append({**record, "length": prompt + max(chosen, rejected)})
            tokens += 2 * prompt + chosen + rejected
    if len(kept) < args.pairs:
        raise SystemExit(f"error: only {len(kept)} pairs have parts of {args.max_length} tokens.")
    return kept, parameters, tokens


class Side:
    """One process, and the figures of the epochs that it has run."""

    def __init__(self, name: str, settings_file: Path, device: str) -> None:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda"}[device],
            "TOKENIZERS_PARALLELISM": "false",
            # Both sides share one GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        log = settings_file.with_name(f"{name}.log")
        self.log = log.open("w")
        self.name, self.rounds = name, []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.trl_sides", name, str(settings_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"error: the {self.name} side failed:\n{Path(self.log.name).read_text()}"
            )
        return json.loads(line)

    def epoch(self) -> None:
        """Runs an epoch and keeps its figures."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append(self._read())

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def compare(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Runs both sides in turns and returns the figures of the fastest epochs."""
    records, parameters, tokens = usable_pairs(args, directory / "model")
    data = directory / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {
        "model": str(directory / "model"),
        "data": str(data),
        "directory": str(directory),
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "learning_rate": 1e-5,
        "epochs": args.rounds + 1,
        "trl_sampling": args.trl_sampling,
        "device": args.device,
        "attention": args.attention,
    }
    settings_file = directory / "settings.json"
    settings_file.write_text(json.dumps(settings))
    sides = [Side(name, settings_file, args.device) for name in ("omerge", "trl")]
    try:
        console = Console(stderr=True)
        for number in track(range(args.rounds + 1), "epochs in turns", console=console):
            for side in sides:
                side.epoch()
                seconds = side.rounds[-1]["seconds"]
                console.print(f"epoch {number}, {side.name}: {seconds:.1f} s", highlight=False)
    finally:
        for side in sides:
            side.close()
    results: dict[str, Any] = {"device": args.device, "parameters": parameters}
    results["useful_tokens_per_epoch"] = tokens
    for side in sides:
        seconds = [one["seconds"] for one in side.rounds[1:]]
        results[side.name] = {
            "first_epoch_seconds": side.rounds[0]["seconds"],
            "seconds": seconds,
            "cpu_seconds": min(one["cpu_seconds"] for one in side.rounds[1:]),
            "tokens_per_second": tokens / min(seconds),
            "peak_mib": side.rounds[-1]["peak_mib"],
        }
    results["load_average"] = os.getloadavg()
    return results


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the comparison."""
    ours, theirs = results["omerge"], results["trl"]
    kind = {"cpu": "float32 on the CPU", "gpu": "bfloat16 on the GPU"}[results["device"]]
    table = Table(
        title=f"DPO, Qwen2 shape of {results['parameters'] / 1e6:.1f} M parameters, {kind}"
    )
    for column in ("", "omerge_jax", "TRL", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for label, name, form in (
        ("useful tokens/s, fastest epoch", "tokens_per_second", ",.0f"),
        ("processor seconds of an epoch, least", "cpu_seconds", ".1f"),
        ("peak memory (resident, or of the GPU), MiB", "peak_mib", ",.0f"),
        ("first epoch, with compilation, s", "first_epoch_seconds", ".1f"),
    ):
        a, b = ours[name], theirs[name]
        table.add_row(label, format(a, form), format(b, form), f"{a / b:.2f}")
    console.print(table)
    load = ", ".join(f"{value:.1f}" for value in results["load_average"])
    console.print(f"load average at the end: {load}", highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison, prints it and writes a JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.trl_throughput",
        description="Useful tokens per second and peak memory of DPO next to TRL's DPOTrainer.",
    )
    parser.add_argument("--data", help="preference file or hub name; made-up pairs when not given")
    parser.add_argument("--pairs", type=int, default=128, help="pairs in an epoch")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs in a step")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of prompt and answer")
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs of each side")
    parser.add_argument("--hidden", type=int, default=384, help="width, a multiple of 128")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--intermediate", type=int, help="default: 8/3 of the width")
    parser.add_argument("--vocabulary", type=int, default=16384, help="most tokens of the BPE")
    parser.add_argument("--embedding_rows", type=int, help="default: as many as tokens")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--attention", choices=("xla", "cudnn"), default="xla", help="of omerge_jax; TRL has sdpa"
    )
    parser.add_argument(
        "--trl_sampling",
        choices=("random", "group_by_length"),
        default="group_by_length",
        help="TRL's train_sampling_strategy",
    )
    parser.add_argument("--output", type=Path, help="JSON to write")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        results = compare(args, Path(directory))
    show(results, Console(width=None if sys.stdout.isatty() else 110))
    if args.output is not None:
        args.output.write_text(json.dumps({**vars(args), **results}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
