"""`python -m train taxbench-lm`: the alignment tax of a language model with real skills."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import jax
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from train.config import ModelOptions, check_settings, ranges, require
from train.inputs.model import check_model, load_tokenizer
from train.taxbench.language_model.data import check_files, prepare
from train.taxbench.language_model.report import write_report
from train.taxbench.language_model.sizes import SIZES
from train.taxbench.language_model.stages import Point, Study
from train.taxbench.language_model.work import show_work
from train.taxbench.suite.directory import own_directory

MethodName = Literal["adamw", "on_ties", "on_dare", "kl", "on_ties_large", "largest", "sign_mask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondScaleConfig:
    """The alignment tax of a language model with real skills, made for SmolLM2-135M.

    SFT on arithmetic and instructions, DPO on harmlessness with every method, merges of AdamW's model
    without training, and what all of them know: SVAMP, MAWPS, GSM8K, MMLU, CommonsenseQA, XQuAD and
    WikiText. Methods are compared at the same held-out margin. Settings come from
    train/configs/smollm2_*.yaml and from the miniature benchmark; nothing is tuned here.

    The size "reduced" is made for two CPU cores, and its report says what it leaves out: 60 steps of
    SFT and 40 of DPO at five times the learning rate of the files, in batches of 8, rows of at most
    96 + 128 (SFT) and 96 + 48 tokens (HH-RLHF alone), 2 evaluations a run, 96 questions a task (48 of
    XQuAD) of at most 160 tokens, 16 of GSM8K answered in full, 256 tokens of 16 articles. "full" takes
    all questions, AlpacaEval's preferences too, and batches of 32 rows of up to 1024 tokens, on a GPU.

    Attributes:
        model: Directory of the model before SFT (from fetch-smollm2), or a hub name.
        data_dir: Directory with the data as gzipped JSON Lines; files that are missing are named with
            their public origin.
        output_dir: Directory of data, runs, results and report. The same command goes on where it
            was stopped; more seeds and methods may be added.
        size: reduced or full.
        seeds: Studies, each with an SFT model, an order of the data and masks of its own.
        methods: Which methods to align with: adamw, to which the others are compared and which has to
            be there; kl (AdamW with β = 0.3); on_ties; on_dare; on_ties_large (few, large steps, the
            best of the miniature); largest (the same without τ); sign_mask (the control without α).
        margin: Held-out margin at which methods are compared. Unset: the largest that all of them
            but the controls reach, and the largest that AdamW reaches.
        dry_run: Prepare the data, show the tokens of every stage, and stop.
    """

    model: str
    data_dir: str
    output_dir: str
    size: Literal["reduced", "full"] = "reduced"
    seeds: ranges.PositiveInt = 1
    methods: list[MethodName] = dataclasses.field(
        default_factory=lambda: list(get_args(MethodName))
    )
    margin: ranges.PositiveFloat | None = None
    dry_run: bool = False

    def check_together(self, name: str) -> None:
        """Checks that AdamW, to which the others are compared, is there. Raises `UserError`."""
        there = "adamw" in self.methods
        require(there, "methods", self.methods, "a list that has adamw in it")


def run_language_model_taxbench(config: SecondScaleConfig) -> Path:
    """Runs every stage that is not done yet, and writes the report.

    Returns:
        The directory with results.jsonl, report.md and plane.png.

    Raises:
        UserError: something given cannot be used, before anything runs; or another process runs the
            study there.
        Stopped: by a signal; the same command goes on.
    """
    check_settings(config)
    check_files(config.data_dir)
    check_model(ModelOptions(path=config.model), name="model")
    console, size = Console(), SIZES[config.size]
    # The size itself too: another version of the program may mean something else by its name.
    given = {name: getattr(config, name) for name in ("model", "data_dir", "size")}
    settings = given | dataclasses.asdict(size)
    what = "a study with another"
    with own_directory(config.output_dir, "study.json", settings, what) as directory:
        tokenizer = load_tokenizer(config.model, "model")
        with console.status("Preparing the data"):
            counts = prepare(config.data_dir, directory / "data", size, tokenizer)
        study = Study(config.model, size, directory, tuple(config.methods), config.seeds, console)
        show_work(study, tokenizer)
        if config.dry_run:
            return directory
        points: list[Point] = []
        with _compiled_programs_kept(directory / "compiled"):
            for found in study.stages():
                points += found
                # After every stage, so that a study that is cut off has one.
                if any(point.method == "adamw" for point in points):
                    report = write_report(study, config.size, points, counts, config.margin)
                    console.print(f"Report so far: {report}", soft_wrap=True, highlight=False)
    return directory


@contextlib.contextmanager
def _compiled_programs_kept(directory: Path) -> Iterator[None]:
    """Keeps compiled programs in a directory: every run and evaluation compiles the same ones."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # something may have been compiled without it
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
