"""Malformed data rows, made from valid ones."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tests.faults.rig import Outcome, Rig
from tests.train.tiny_runs import make_records, make_tokenizer, run_flags
from train.cli import main
from train.config import DataOptions, UserError
from train.data import tokenize_preference
from train.inputs.records import load_data

_EVERY_COMMAND = 40
FIELDS = ("prompt", "chosen", "rejected")
VALUES: list[Any] = [
    None, "", "   ", 0, -1, 3.5, True, [], {}, [[]], [{}], [None], ["text"], {"role": "user"},
    [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": ""}], [{"role": 1, "content": "x"}],
    [{"role": "user", "content": ["x"]}], [{"role": "", "content": "x"}],
    [{"role": "assistant", "content": "x"}] * 2, [{"role": "user", "content": "x"}],
    "\ud800", "a\udfffb", "\x00", "\u202e", float("nan"), float("inf"), 10**400,
    "x" * 20_000,
]  # fmt: skip


def _bytes(row: dict[str, Any], rng: np.random.Generator) -> bytes:
    """Cut off, bytes changed, deleted or put in."""
    line = bytearray(json.dumps(row).encode())
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(line)))
        kind = rng.integers(4)
        if kind == 0:
            del line[place:]
        elif kind == 1:
            line[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del line[place : place + int(rng.integers(1, 20))]
        else:
            line[place:place] = rng.bytes(int(rng.integers(1, 9)))
        if not line:
            break
    return bytes(line).replace(b"\n", b" ").replace(b"\r", b" ")


def _fields(row: dict[str, Any], rng: np.random.Generator) -> bytes:
    """A field missing, under another name, or of another type."""
    row, name = copy.deepcopy(row), str(rng.choice(FIELDS))
    kind = rng.integers(4)
    if kind == 0:
        del row[name]
    elif kind == 1:
        row[name.upper()] = row.pop(name)
    else:
        row[name] = VALUES[int(rng.integers(len(VALUES)))]
    return json.dumps(row).encode()


def _messages(row: dict[str, Any], rng: np.random.Generator) -> bytes:
    """Turns in another order, twice, without a role, with another value."""
    row = copy.deepcopy(row)
    turn, kind = row["prompt"][0], rng.integers(5)
    if kind == 0:
        row["prompt"] = row["prompt"] * int(rng.integers(2, 4))
    elif kind == 1:
        row["prompt"].append({"role": "assistant", "content": "yes"})
    elif kind == 2:
        del turn[str(rng.choice(["role", "content"]))]
    elif kind == 3:
        turn[str(rng.choice(["role", "content"]))] = VALUES[int(rng.integers(len(VALUES)))]
    else:
        row["chosen"] = row["rejected"]
    return json.dumps(row).encode()


def _values(row: dict[str, Any], rng: np.random.Generator) -> bytes:
    """Not an object at all, nested very deeply, or a number of very many digits."""
    kind = rng.integers(6)
    if kind == 0:
        depth = int(rng.integers(10, 100_000))
        return b"[" * depth + b"]" * int(rng.integers(depth + 1))
    if kind == 1:
        return b'{"prompt": %s, "chosen": "a", "rejected": "b"}' % (b"9" * 5000)
    return json.dumps(VALUES[int(rng.integers(len(VALUES)))]).encode()


MUTATIONS: tuple[Callable[[dict[str, Any], np.random.Generator], bytes], ...] = (
    _bytes, _fields, _fields, _messages, _values,
)  # fmt: skip


def malformed_rows(rig: Rig, count: int, seed: int) -> Outcome:
    """Puts each row between valid ones and reads the file as a run does; a few by whole commands."""
    outcome = Outcome(
        "malformed data row",
        "one row of 4, made from a valid one: bytes, fields, messages, values",
        "a message with field, file and line, or dropped and counted, or still a valid row",
    )
    rng, tokenizer, became = np.random.default_rng(seed), make_tokenizer(), Counter[str]()
    valid = make_records(4)
    for number in range(count):
        bad = int(rng.integers(4))
        mutate = MUTATIONS[number % len(MUTATIONS)]
        lines = [json.dumps(row).encode() for row in valid]
        lines[bad] = mutate(valid[bad], rng)
        file = rig.directory / "rows.jsonl"
        file.write_bytes(b"\n".join(lines) + b"\n")
        outcome.tries += 1
        result = _read(file, bad + 1, lines[bad], tokenizer, outcome)
        became[result] += 1
        if result == "refused" and became[result] % _EVERY_COMMAND == 1:
            became["of these by the whole command, with status 2"] += 1
            _run(rig, file, bad + 1, outcome)
    outcome.detail = ", ".join(f"{number} {name}" for name, number in became.items())
    return outcome


def _run(rig: Rig, file: Path, line: int, outcome: Outcome) -> None:
    output, shown = rig.directory / "refused", io.StringIO()
    flags = run_flags(rig.inputs, output, data__path=file, data__eval_fraction=None)
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
        status = main(["dpo", *flags])
    message = shown.getvalue()
    outcome.check(status == 2, f"status {status} for {file.read_bytes()[:300]!r}")
    outcome.check(message.startswith("error: data.path: "), f"unclear: {message[:300]}")
    outcome.check(f"{file.name} line {line}" in message, f"no line in {message[:300]}")
    outcome.check(not output.exists(), "something was written")


def _read(file: Path, line: int, content: bytes, tokenizer: Any, outcome: Outcome) -> str:
    options = DataOptions(path=str(file), max_prompt_length=64, max_completion_length=64)
    try:
        data, _ = load_data(options, tokenize_preference, tokenizer, Console(quiet=True))
    except UserError as error:
        clear = str(error).startswith("data.path: ") and f"{file.name} line {line}" in str(error)
        outcome.check(clear, f"unclear: {error} for {content[:200]!r}")
        outcome.check(len(str(error)) < 1000, f"a message of {len(str(error))} characters")
        return "refused"
    except Exception as error:
        where = re.sub(r"\s+", " ", repr(error))[:200]
        outcome.failures.append(f"{where} for {content[:200]!r}")
        return "crashed"
    report = data.report
    counted = len(data) + sum(report.dropped.values())
    blank = not content.strip()
    outcome.check(counted == 4 - blank, f"{counted} rows accounted for, of 4: {content[:200]!r}")
    if blank:
        return "blank"
    return "dropped and counted" if report.dropped else "valid"
