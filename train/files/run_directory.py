"""The directory of a run: what it holds, and whether that belongs to this run.

::

    run.json        command, settings and content hashes of the inputs: the run's identity
    config.yaml     the resolved settings, ready for --config
    metrics.jsonl   one line per logged step; tensorboard/ holds the same
    checkpoints/    STEP/ directories by Orbax
    reference/      cached log-probabilities of the reference
    export/         the trained model in Hugging Face format
    adapter/        its low-rank adapters in the format of PEFT, where these were trained
    summary.json    written last: the run is complete
    before-1/       records of another run that ended here before its first checkpoint
    .lock           held by the process that writes here

Nothing is ever overwritten: a directory that holds another run, or files that no run wrote, is
refused, and so is one that another process is writing to. The records of a run that ended before its
first checkpoint, for a wrong setting or for lack of memory, are put aside, and the next run takes
the directory. On several hosts the first process writes everything but the checkpoints.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
import yaml

from train.config import FREE_FIELDS, UserError, flatten
from train.distributed.processes import barrier, from_first, is_first
from train.files.lock import LOCK_FILE, hold, refuse_if_held
from train.files.whole import check_place, is_partial, unwritable, write_json, write_whole


@dataclasses.dataclass(frozen=True)
class OutputDir:
    """The directory of one run. `open_output` makes the object; nothing is written before `begin`.

    `identity` holds the command and the settings that tell this run from another. When `started`, the
    directory already holds this run, and `summary` what it reported if it has finished. When
    `abandoned`, it holds another run, which ended before its first checkpoint.
    """

    path: Path
    identity: dict[str, Any]
    started: bool = False
    summary: dict[str, Any] | None = None
    abandoned: bool = False

    @property
    def checkpoints(self) -> Path:
        """Orbax's checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The trained model."""
        return self.path / "export"

    def begin(self, config: Any, inputs: dict[str, str]) -> Path | None:
        """Creates the directory, or checks that the inputs of the run that it holds are unchanged.

        From then on the directory is locked, until `train.files.lock.release` or the end of the
        process. `config` goes to config.yaml; `inputs` are content hashes, by name, of what the run
        reads. Returns where the records of an abandoned run were put, or None where there was none.
        Raises `UserError` where an input's content changed since the run began and saved something,
        another process is writing here, or nothing can be written.
        """
        run_file = self.path / "run.json"
        other = self.abandoned or (self.started and self._has_other_inputs(inputs))
        # Nothing is written before every process has accepted what is given.
        barrier("everything given is checked")
        aside = None
        try:
            if is_first():
                self.path.mkdir(parents=True, exist_ok=True)
            hold(self.path)
            if not self.started and not other and from_first(run_file.exists()):
                raise UserError(
                    f"output_dir {str(self.path)!r}: another process has begun a run there in the "
                    "meantime. Start again, or choose a new output_dir."
                )
            if is_first():
                aside = _put_aside(self.path) if other else None
                self._record(config, inputs)
        except OSError as error:
            raise unwritable("output_dir", self.path, error) from error
        barrier("output directory begun")
        if not run_file.exists():
            raise UserError(
                f"output_dir {str(self.path)!r}: what the first process wrote there is not seen by "
                f"process {jax.process_index()}. Choose a directory that all hosts share."
            )
        return aside

    def _has_other_inputs(self, inputs: dict[str, str]) -> bool:
        """Whether an input has changed; raises `UserError` where the run has saved something."""
        before = json.loads((self.path / "run.json").read_text())["inputs"]
        changed = [name for name in inputs if before.get(name) != inputs[name]]
        if changed and not _holds_records_alone(self.path):
            raise UserError(
                f"output_dir {str(self.path)!r} holds a run whose {', '.join(changed)} had "
                "other content than now. Bring it back, or choose a new output_dir."
            )
        return bool(changed)

    def _record(self, config: Any, inputs: dict[str, str]) -> None:
        """Writes the two files that are not there yet; a kill may have come between them."""
        if not (self.path / "run.json").exists():
            write_json(self.path / "run.json", {**self.identity, "inputs": inputs})
        settings_file = self.path / "config.yaml"
        if not settings_file.exists():
            settings = dataclasses.asdict(config)
            if "distributed" in settings:
                settings["distributed"]["process_id"] = None  # each process has its own
            write_whole(settings_file, yaml.safe_dump(settings, sort_keys=False))

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the run as complete."""
        if is_first():
            write_json(self.path / "summary.json", summary)


def open_output(command: str, config: Any) -> OutputDir:
    """Looks at ``config.output_dir`` without changing anything; `command` is a name such as "dpo".

    Raises `UserError` where it holds another run (the differing fields are named) or files that no run
    wrote, another process is writing to it, or it cannot be read or written.
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
        found = [name for name in found if not is_partial(name) and name != LOCK_FILE]
        if found and not (any(map(_is_aside, found)) and _holds_records_alone(path)):
            raise UserError(
                f"output_dir {str(path)!r} is not empty and holds no run (found {found[0]!r}); "
                "nothing is overwritten, so choose a new output_dir."
            )
        return OutputDir(path, identity)
    try:
        found = json.loads(run_file.read_text())
        other = _difference({"command": found["command"], **found["settings"]}, identity)
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{run_file} cannot be read as a run's record ({error}).") from error
    if other is not None:
        if not _holds_records_alone(path):
            raise UserError(
                f"output_dir {str(path)!r} holds another run: {other}. Nothing is overwritten, so "
                "choose a new output_dir."
            )
        return OutputDir(path, identity, abandoned=True)
    summary = json.loads(summary_file.read_text()) if summary_file.exists() else None
    return OutputDir(path, identity, started=True, summary=summary)


_SHOWN_DIFFERENCES = 3


def _difference(before: dict[str, Any], identity: dict[str, Any]) -> str | None:
    """Says what differs; None where nothing does."""
    # Through JSON, so that tuples and lists, or 1 and 1.0, do not count as differences.
    now = json.loads(json.dumps({"command": identity["command"], **identity["settings"]}))
    names = [*now, *(name for name in before if name not in now)]
    differing = [name for name in names if before.get(name) != now.get(name)]
    shown = "; ".join(
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in differing[:_SHOWN_DIFFERENCES]
    )
    more = len(differing) - _SHOWN_DIFFERENCES
    return shown + (f"; and {more} more" if more > 0 else "") if differing else None


_RECORDS = ("run.json", "config.yaml", "metrics.jsonl", "tensorboard")
_ASIDE = "before-"


def _holds_records_alone(path: Path) -> bool:
    """Whether the directory holds only records of a run that saved nothing, and a cache."""
    checkpoints = path / "checkpoints"
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        return False
    expected = {*_RECORDS, "checkpoints", "reference", LOCK_FILE}
    return all(
        item.name in expected or is_partial(item.name) or _is_aside(item.name)
        for item in path.iterdir()
    )


def _is_aside(name: str) -> bool:
    return name.startswith(_ASIDE) and name.removeprefix(_ASIDE).isdigit()


def _put_aside(path: Path) -> Path:
    """Moves the records of a run into a directory of their own; run.json, its identity, goes last."""
    numbered = (path / f"{_ASIDE}{number}" for number in itertools.count(1))
    aside = next(place for place in numbered if not place.exists())
    aside.mkdir()
    for name in reversed(_RECORDS):
        if (path / name).exists():
            (path / name).rename(aside / name)
    return aside
