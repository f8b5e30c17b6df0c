"""The directory of a run: what is in it, and whether it is this run.

::

    run.json        command, settings and content hashes of the inputs: the run's identity
    config.yaml     the resolved settings, ready for --config
    metrics.jsonl   one line per logged step; tensorboard/ holds the same
    checkpoints/    STEP/ directories by Orbax
    reference/      cached log-probabilities of the reference
    export/         the trained model in Hugging Face format
    adapter/        its low-rank adapters in the format of PEFT, where these were trained
    summary.json    written last: the run is complete
    .lock           held by the process that writes here

Nothing is ever overwritten: a directory that holds another run, or files that no run wrote, is
refused, and so is one that another process is writing to. On several hosts the first process writes
all but the checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import yaml

from train.config import FREE_FIELDS, UserError, flatten
from train.lock import LOCK_FILE, hold, refuse_if_held
from train.processes import first_says, is_first, meet


@dataclasses.dataclass(frozen=True)
class OutputDir:
    """Paths of one run. Made by `open_output`; nothing is written before `begin`.

    Attributes:
        path: The directory.
        identity: Command and settings that tell this run from another.
        started: The directory already holds this run.
        summary: What the finished run reported, or None when it is not finished.
    """

    path: Path
    identity: dict[str, Any]
    started: bool
    summary: dict[str, Any] | None

    @property
    def checkpoints(self) -> Path:
        """Orbax's directory."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The trained model."""
        return self.path / "export"

    def begin(self, config: Any, inputs: dict[str, str]) -> None:
        """Creates the directory, or checks that the inputs of the run that it holds are unchanged.

        From then on the directory is locked, until `train.lock.release` or the end of the process.

        Args:
            config: The settings, written to config.yaml.
            inputs: Content hash by name of what the run reads.

        Raises:
            UserError: an input's content changed since the run began, another process is writing
                here, or nothing can be written.
        """
        run_file = self.path / "run.json"
        meet("everything given is checked")  # so that nothing is written where one of them refuses
        try:
            if is_first():
                self.path.mkdir(parents=True, exist_ok=True)
            hold(self.path)
        except OSError as error:
            raise _unusable("output_dir", self.path, error) from error
        if self.started:
            before = json.loads(run_file.read_text())["inputs"]
            changed = [name for name in inputs if before.get(name) != inputs[name]]
            if changed:
                raise UserError(
                    f"output_dir {str(self.path)!r} holds a run whose {', '.join(changed)} had "
                    "other content than now. Bring it back, or choose a new output_dir."
                )
        elif first_says(run_file.exists()):
            raise UserError(
                f"output_dir {str(self.path)!r}: another process has begun a run there in the "
                "meantime. Start again, or choose a new output_dir."
            )
        if is_first():
            try:
                self._record(config, inputs)
            except OSError as error:
                raise _unusable("output_dir", self.path, error) from error
        meet("output directory begun")
        if not run_file.exists():
            raise UserError(
                f"output_dir {str(self.path)!r}: what the first process wrote there is not seen by "
                f"process {jax.process_index()}. Choose a directory that all hosts share."
            )

    def _record(self, config: Any, inputs: dict[str, str]) -> None:
        """Writes what is not there yet; a kill may have come between the two files."""
        if not self.started:
            record = json.dumps({**self.identity, "inputs": inputs}, indent=2)
            write_atomically(self.path / "run.json", record)
        settings_file = self.path / "config.yaml"
        if not settings_file.exists():
            settings = dataclasses.asdict(config)
            if "distributed" in settings:
                settings["distributed"]["process_id"] = None  # each process has its own
            write_atomically(settings_file, yaml.safe_dump(settings, sort_keys=False))

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the run as complete."""
        if is_first():
            write_atomically(self.path / "summary.json", json.dumps(summary, indent=2))


def open_output(command: str, config: Any) -> OutputDir:
    """Looks at ``config.output_dir`` without changing anything.

    Args:
        command: "sft" or "dpo".
        config: The settings of the run.

    Returns:
        The directory, with `started` and `summary` telling what it holds.

    Raises:
        UserError: it holds another run (the differing fields are named) or files that no run wrote,
            another process is writing to it, or it cannot be read or written.
    """
    path = Path(config.output_dir).expanduser().absolute()
    settings = {key: value for key, value in flatten(config).items() if key not in FREE_FIELDS}
    identity = {"command": command, "settings": settings}
    if os.path.isfile(path):  # unlike Path's, it answers where a directory cannot be entered
        raise UserError(f"output_dir {str(path)!r} is a file; choose a directory.")
    run_file, summary_file = path / "run.json", path / "summary.json"
    if not os.path.exists(summary_file):
        check_place(path, "output_dir")
        refuse_if_held(path)
    if not run_file.exists():
        found = sorted(item.name for item in path.iterdir()) if path.exists() else []
        found = [name for name in found if not name.endswith(_PARTIAL) and name != LOCK_FILE]
        if found:
            raise UserError(
                f"output_dir {str(path)!r} is not empty and holds no run (found {found[0]!r}); "
                "nothing is overwritten, so choose a new output_dir."
            )
        return OutputDir(path, identity, started=False, summary=None)
    try:
        found = json.loads(run_file.read_text())
        _check_same(path, {"command": found["command"], **found["settings"]}, identity)
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{run_file} cannot be read as a run's record ({error}).") from error
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else None
    return OutputDir(path, identity, started=True, summary=summary)


def check_place(path: Path, name: str) -> None:
    """Checks that `path` can be made or written, by a file without a name that vanishes again.

    Args:
        path: A file or directory that may not exist yet.
        name: Field that gave it, for messages.

    Raises:
        UserError: its nearest existing directory cannot be written to.
    """
    place = path
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _unusable(name, path, error) from error


def _unusable(name: str, path: Path, error: OSError) -> UserError:
    return UserError(
        f"{name} {str(path)!r} cannot be written ({error.strerror}); choose a place that can be."
    )


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that a kill leaves either the whole file or none."""
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


_PARTIAL = ".partial"
_SHOWN_DIFFERENCES = 3


def _check_same(path: Path, before: dict[str, Any], identity: dict[str, Any]) -> None:
    # Through JSON, so that tuples and lists, or 1 and 1.0, do not count as differences.
    now = json.loads(json.dumps({"command": identity["command"], **identity["settings"]}))
    names = [*now, *(name for name in before if name not in now)]
    differing = [name for name in names if before.get(name) != now.get(name)]
    if not differing:
        return
    shown = "; ".join(
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in differing[:_SHOWN_DIFFERENCES]
    )
    more = len(differing) - _SHOWN_DIFFERENCES
    raise UserError(
        f"output_dir {str(path)!r} holds another run: {shown}"
        + (f"; and {more} more" if more > 0 else "")
        + ". Nothing is overwritten, so choose a new output_dir."
    )
