"""Full disks and damaged checkpoints."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from tests.faults.rig import EVERY, Outcome, Rig, complete, damaged, is_clear, send
from train.config import UserError
from train.training.checkpoint import Checkpoints, abstract
from train.training.step import init_state


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[bool]:
    """Mounts a file system of `size` bytes; yields False where that is not allowed."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, leave: int) -> None:
    """Writes a file that leaves so many bytes free."""
    disk = os.statvfs(place)
    size = max(0, disk.f_bavail * disk.f_frsize - leave)
    with (place / "filler").open("wb") as file, contextlib.suppress(OSError):
        file.write(os.urandom(size))


def disk_full(rig: Rig, leave_of_checkpoint: float) -> Outcome:
    """Fills the disk once two checkpoints are there; then makes room."""
    left = f"{leave_of_checkpoint:.0%} of a checkpoint" if leave_of_checkpoint else "nothing"
    outcome = Outcome(
        "full disk",
        f"tmpfs filled during the run, {left} left",
        "status 2 with a message, last checkpoint stays; goes on when there is room; equal",
        tries=1,
    )
    last = rig.whole / "checkpoints" / str(rig.steps)
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    place = rig.directory / f"disk-{leave_of_checkpoint}"
    whole = sum(path.stat().st_size for path in rig.whole.rglob("*") if path.is_file())
    with small_disk(place, whole + 3 * size + 2**20) as mounted:
        if not mounted:
            outcome.tries, outcome.detail = 0, "not run: mounting needs root"
            return outcome
        output = place / "run"
        status, shown, acted = rig.disturb(
            output,
            lambda: len(complete(output)) == 2,
            lambda process: fill(place, int(leave_of_checkpoint * size)),
        )
        outcome.check(acted and status == 2, f"status {status}: {shown[-300:]}")
        outcome.check("No space left on device" in shown, f"no reason in {shown[-300:]}")
        outcome.check(is_clear(shown), f"traceback: {shown[-2000:]}")
        kept = complete(output)
        outcome.check(kept, "no checkpoint is left")
        outcome.failures += damaged(output)
        outcome.detail = shown.strip().splitlines()[-1][:160].replace(str(rig.directory), "…")
        (place / "filler").unlink()
        status, shown = rig.finish(output)
        outcome.check(status == 0, f"status {status}: {shown[-300:]}")
        outcome.check(f"Resuming after step {max(kept)} of" in shown, "another checkpoint was used")
        difference = rig.differences(output)
        outcome.check(difference is None, str(difference))
    return outcome


def flip(path: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leaves the first half."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGES = {"truncated": cut, "bit flipped": flip, "deleted": Path.unlink}


def damaged_runs(rig: Rig) -> list[Outcome]:
    """Real runs that are stopped, damaged in the newest checkpoint, and started again."""
    stopped = rig.directory / "stopped"
    rig.disturb(stopped, lambda: len(complete(stopped)) == 2, send(signal.SIGKILL))
    newest = max(complete(stopped))
    outcomes = []
    for name, damage in DAMAGES.items():
        outcome = Outcome(
            f"checkpoint {name}",
            "largest file of the newest checkpoint",
            "warning; goes on from the one before; result equal bit for bit",
            tries=1,
        )
        output = rig.directory / f"damaged-{name.replace(' ', '-')}"
        shutil.copytree(stopped, output)
        files = [
            path for path in (output / "checkpoints" / str(newest)).rglob("*") if path.is_file()
        ]
        damage(max(files, key=lambda path: path.stat().st_size))
        status, shown = rig.finish(output)
        flat = " ".join(shown.split())
        outcome.check(status == 0, f"status {status}: {shown[-300:]}")
        outcome.check(f"Warning: the checkpoint of step {newest} is damaged" in flat, "no warning")
        outcome.check(f"Resuming after step {newest - EVERY} of" in flat, "not from the one before")
        outcome.check(is_clear(shown), f"traceback: {shown[-300:]}")
        aside = output / "damaged-checkpoints" / str(newest)
        outcome.check(aside.is_dir(), "the damaged checkpoint is gone")
        difference = rig.differences(output)
        outcome.check(difference is None, str(difference))
        outcome.detail = f"step {newest} set aside, went on from {newest - EVERY}"
        outcomes.append(outcome)
    return outcomes


def every_file(directory: Path) -> Outcome:
    """Each file of a checkpoint in turn: cut, flipped, deleted."""
    outcome = Outcome(
        "any file of a checkpoint damaged",
        "each file in turn truncated, one bit flipped, deleted",
        "the one before is restored, or the file does not matter and the state is equal",
    )

    def make(step: int) -> dict[str, object]:
        return init_state({"w": jnp.full((64, 8), step, jnp.float32)}, optax.adam(1e-3))

    whole = directory / "whole" / "checkpoints"
    with Checkpoints(whole, keep=2) as saved:
        for step in (1, 2):
            saved.save(step, make(step), {"step": step})
    names = [path.relative_to(whole) for path in sorted((whole / "2").rglob("*")) if path.is_file()]
    used = Counter[int]()
    for name in names:
        for kind, damage in DAMAGES.items():
            outcome.tries += 1
            step = _restored(directory, whole, name, damage, make, outcome, f"{name} {kind}")
            used[step] += 1
    outcome.detail = f"{used[1]} times the one before, {used[2]} times a file that does not matter"
    return outcome


def _restored(
    directory: Path,
    whole: Path,
    name: Path,
    damage: Callable[[Path], None],
    make: Callable[[int], dict[str, object]],
    outcome: Outcome,
    what: str,
) -> int:
    place = directory / "copy"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place / "checkpoints")
    damage(place / "checkpoints" / name)
    try:
        with Checkpoints(place / "checkpoints", keep=2, warn=lambda message: None) as saved:
            step = saved.newest_intact()
            assert step is not None
            state, position = saved.restore(step, abstract(jax.eval_shape(lambda: make(1))))
    except UserError as error:
        outcome.failures.append(f"{what}: {error}")
        return 0
    same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, make(step)))
    outcome.check(same and position == {"step": step}, f"{what}: another state")
    return step
