"""Checkpoints of the training state and of the position in the data, written in the background."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.config import UserError
from train.distributed.processes import barrier, from_each, is_first
from train.distributed.stop import Stopped, TryAgain
from train.files.checksums import (
    Checksums,
    file_names,
    find_damage,
    hash_files,
    write_manifest,
)
from train.training.save_agreement import SaveAgreement, brief
from train.types import State

_METADATA_FILE = "_CHECKPOINT_METADATA"
"""A file into which Orbax writes once more after `_write_manifest`; a restore does not need it."""
_PARTIAL = ".orbax-checkpoint-tmp"
_SAVE_S = 4 * 3600
"""Seconds that a save may take. A process that dies ends the others long before."""
_LOG = logging.getLogger(__name__)
_policies = ocp.checkpoint_managers
Warn = Callable[[str], None]


class Checkpoints:
    """Saves and restores the training state together with the loader's state.

    A checkpoint is written under a temporary name, with the checksums of its files, and renamed
    when it is complete; an older one is deleted only after that. So a kill or a full disk at any
    moment leaves the last good one in place, and damage that comes later is found before a restore.
    What a killed save left behind is removed when the directory is opened again.

    The directory is made when it does not exist. With `every`, saves are due at multiples of this step;
    the `keep` newest checkpoints stay. With `read_only` the directory stays as it is and nothing can be
    saved. `warn` is called with a message about a save that failed or a damaged checkpoint.

    Example:
        >>> with Checkpoints(directory, every=100, keep=2) as checkpoints:  # doctest: +SKIP
        ...     checkpoints.save(100, state, loader.get_state())
        ...     state, position = checkpoints.restore(100, abstract_state)
    """

    def __init__(
        self,
        directory: Path,
        *,
        every: int | None = None,
        keep: int = 1,
        read_only: bool = False,
        warn: Warn = _LOG.warning,
    ) -> None:
        self._directory, self._every, self._read_only = directory.absolute(), every, read_only
        self._preserve, self._warn = _Preserve(keep), warn
        self._saving: int | None = None
        self._intact: int | None = None
        self._agreement = SaveAgreement(self._hash_own)
        _hide_reported_errors()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # Orbax would remove remains in the background, where a manager opened soon after another
        # one finds files gone that it is just removing, and fails its first save.
        if is_first() and not self._read_only:
            for remains in self._directory.glob(f"*{_PARTIAL}*"):
                shutil.rmtree(remains, ignore_errors=True)
        interval = (
            _policies.FixedIntervalPolicy(self._every)
            if self._every
            else _policies.SpecificStepsPolicy(())
        )
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=interval,
            preservation_policy=self._preserve,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(
                timeout_secs=_SAVE_S,
                barrier_sync_fn=self._agreement.barrier,
                post_finalization_callback=self._write_manifest,
            ),
            cleanup_tmp_directories=False,
            read_only=self._read_only,
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def due(self, step: int) -> bool:
        """Whether to save at `step`."""
        return self._manager.should_save(step)

    def save(
        self, step: int, state: State, position: dict[str, Any], *, also_keep: Collection[int] = ()
    ) -> None:
        """Starts writing a checkpoint; the state may be donated as soon as this returns.

        `position` is the loader's state, of types that JSON has. The checkpoints of the steps
        `also_keep` stay besides the newest ones. A save that fails is warned about, here or at the
        next call; earlier checkpoints stay. Where other processes do not know of the failure, it
        raises `UserError` for a full disk and `TryAgain` for anything else.
        """
        self.wait()
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position)
        )
        self._preserve.also, self._saving = frozenset(also_keep), step
        self._agreement.begin()
        self._try(lambda: self._manager.save(step, args=arguments, force=True))

    def wait(self) -> bool:
        """Waits until everything is on disk; returns False after a save that failed, with a warning.

        Raises the same errors as `save`.
        """
        done = self._try(self._manager.wait_until_finished)
        self._saving = None
        return done

    def _try(self, action: Callable[[], Any]) -> bool:
        """Calls Orbax; returns whether that went well, and cleans up where it did not."""
        try:
            action()
            return True
        except Exception as error:  # Orbax, TensorStore and the system raise all kinds
            failure = error
        self._failed(failure)  # not in `except`: barriers take that for a failure of their own
        return False

    def _failed(self, error: Exception) -> None:
        """Gives up the save under way, and warns; raises where other processes do not know of it."""
        step, self._saving = self._saving, None
        # Orbax has forgotten the checkpoints that it was to delete after this one; they are there.
        names = (path.name for path in self._directory.iterdir())
        last = max((int(name) for name in names if name.isdigit()), default=None)
        kept = "there is no earlier one" if last is None else f"the one of step {last} stays"
        found = f"the checkpoint of step {step} could not be written ({brief(error)}); {kept}."
        # To open the directory again all processes have to come, and only this one may know of it.
        if jax.process_count() > 1 and not self._agreement.failed:
            if brief(error) in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)):
                message = f"{found} Make room; the same command goes on from there."
                raise UserError(message) from error
            raise TryAgain(f"{found} The same command goes on from there.") from error
        with contextlib.suppress(Exception):  # what went wrong is known
            self._manager.close()
        self._manager = self._open()  # which removes the remains, and frees their space
        self._warn(found)

    def _hash_own(self) -> Checksums:
        """Computes the checksums of the files of this process; Orbax has just written them."""
        partial, me = self._partial(), jax.process_index()
        mine = [name for name in file_names(partial) if _writer(name) == me]
        # The directories in it have temporary names too, which they lose before `_write_manifest`.
        return {
            re.sub(rf"{re.escape(_PARTIAL)}[^/]*", "", name): found
            for name, found in hash_files(partial, mine).items()
        }

    def _write_manifest(self) -> None:
        """Writes the manifest. The first process calls this, before the files get their final name."""
        write_manifest(self._partial(), self._agreement.checksums(), ignore=_METADATA_FILE)

    def _partial(self) -> Path:
        """Returns the directory of the save that is under way."""
        return next(self._directory.glob(f"{self._saving}{_PARTIAL}*"))

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """Reads one of `steps`: the state, placed like `like`, and the loader's state.

        `like` comes from `abstract`. Raises `UserError` where the files are damaged or do not hold
        such a state.
        """
        # To find damage takes reading every byte, so what `newest_intact` has just found counts once.
        known, self._intact = self._intact, None
        damage = None if step == known else self.damage(step)
        if damage is not None:
            raise UserError(f"checkpoint {step} in {self._directory} is damaged: {damage}.")
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=arguments)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint {step} in {self._directory} cannot be restored: {error}"
            ) from error
        return restored["state"], restored["data"]

    def damage(self, step: int) -> str | None:
        """Says what is wrong with the files of a checkpoint, or returns None.

        Every process reads the files that a process of its number wrote. All must call this.
        """
        me, count = jax.process_index(), jax.process_count()
        found = find_damage(
            self._directory / str(step), lambda name: (_writer(name) or 0) % count == me
        )
        if count == 1:
            return found
        return next(filter(None, from_each(found)), None)

    def newest_intact(self) -> int | None:
        """Finds the step of the newest checkpoint without damage; None when there is no checkpoint.

        Newer ones are warned about and moved to ``damaged-checkpoints`` beside the directory, so that
        their steps can be saved again. Where all are damaged they stay, and it raises `UserError`.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                self._set_aside(damaged, step)
                self._intact = step
                return step
            damaged[step] = damage
        if damaged:
            listed = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
            raise UserError(
                f"every checkpoint in {self._directory} is damaged ({listed}). Bring one back, or "
                "start again in a new output_dir."
            )
        return None

    def _set_aside(self, damaged: dict[int, str], intact: int) -> None:
        """Moves damaged checkpoints out of the way; a name that is taken gets a number."""
        place = self._directory.with_name(f"damaged-{self._directory.name}")
        for step, damage in damaged.items():
            if is_first():
                place.mkdir(exist_ok=True)
                aside, number = place / str(step), 0
                while aside.exists():
                    number += 1
                    aside = place / f"{step}-{number}"
                (self._directory / str(step)).rename(aside)
            self._warn(
                f"the checkpoint of step {step} is damaged ({damage}); going back to the one of "
                f"step {intact}. The damaged one is now in {place}."
            )
        if damaged:
            barrier("damaged checkpoints moved")
            self._manager.reload()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # One of several processes that ends with an error does not wait for the others, who may not
        # come where Orbax waits for them; `train.distributed.join` tells them.
        if error is None or isinstance(error, Stopped) or jax.process_count() == 1:
            self.wait()
            self._manager.close()


class _Preserve(_policies.PreservationPolicy):
    """Keeps the newest checkpoints and named ones. Orbax asks before a save and deletes after it."""

    def __init__(self, keep: int) -> None:
        self.keep, self.also = keep, frozenset[int]()

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: _policies.PreservationContext
    ) -> Sequence[bool]:
        newest = {info.step for info in checkpoints[-self.keep :]}
        return [info.step in newest or info.step in self.also for info in checkpoints]


def _writer(name: str) -> int | None:
    """The number of the process that wrote a file; None for a file of all processes."""
    found = re.search(r"(?:^|[./])process_(\d+)(?:/|$)", name)
    return int(found[1]) if found else None


@functools.cache
def _hide_reported_errors() -> None:
    """Hides what Python would show of Orbax's errors in a failed save, which `Checkpoints` reports."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_from_orbax)
    show = sys.unraisablehook
    sys.unraisablehook = lambda raised: None if _is_late(raised.exc_value) else show(raised)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    """Whether a log record has no exception, or one that did not come through Orbax."""
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    frames = traceback.walk_tb(error.__traceback__) if error is not None else ()
    return not any("orbax" in frame.f_code.co_filename for frame, _ in frames)


def _is_late(error: BaseException | None) -> bool:
    """Whether TensorStore reports a write of a save that had failed and was given up."""
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def restore_params(directory: Path, step: int, like: Any, name: str = "params") -> Any:
    """Reads the parameters alone of a checkpoint in the directory of `Checkpoints`, with any optimizer.

    `like` has their shapes, dtypes and shardings; `name` is "params", or "ema" for their average.
    """
    item = {name: like}
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(directory.absolute() / str(step) / "state", arguments)[name]


def abstract(state: State, shardings: Any = None) -> State:
    """The shapes, dtypes and places of a state, of arrays or `jax.ShapeDtypeStruct`.

    `shardings` comes from `train.training.step.state_shardings`; None puts all of the state in the
    memory of one device.
    """
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, state)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        shardings,
    )
