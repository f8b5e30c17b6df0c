"""Checkpoints of the training state and of the position in the data, written in the background."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.config import UserError
from train.distributed.processes import barrier, from_first, is_first
from train.distributed.stop import Stopped, TryAgain
from train.files.checksums import find_damage, write_manifest
from train.training.save_agreement import SaveAgreement, brief
from train.types import State

# Orbax writes into it once more after `_seal`; a restore does not need it.
_TIMES = "_CHECKPOINT_METADATA"
_PARTIAL = ".orbax-checkpoint-tmp"
# Until the first process has the checksums of all files, which the others wait for. One that has gone
# ends the others long before.
_SAVE_S = 4 * 3600
_LOG = logging.getLogger(__name__)
_policies = ocp.checkpoint_managers
Warn = Callable[[str], None]


class Checkpoints:
    """Saves and restores the training state together with the loader's state.

    A checkpoint is written under a temporary name, with the checksums of its files, and renamed
    when it is complete; an older one is deleted only after that. So a kill or a full disk at any
    moment leaves the last good one in place, and damage that comes later is found before a restore.
    What a killed save left behind is removed when the directory is opened again.

    Args:
        directory: Made when it does not exist.
        every: Save at multiples of this step; None: only when told to.
        keep: Newest checkpoints that stay.
        read_only: Leave the directory as it is; nothing can be saved.
        warn: Told of a save that failed and of a damaged checkpoint.

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
        self._agreement = SaveAgreement()
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
                post_finalization_callback=self._seal,
            ),
            cleanup_tmp_directories=False,
            read_only=self._read_only,
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def due(self, step: int) -> bool:
        """Whether `step` is one to save at."""
        return self._manager.should_save(step)

    def save(
        self, step: int, state: State, position: dict[str, Any], *, also_keep: Collection[int] = ()
    ) -> None:
        """Starts writing a checkpoint; the state may be donated as soon as this returns.

        A save that fails is warned about, here or at the next call; earlier checkpoints stay.

        Args:
            step: Updates done so far.
            state: The training state.
            position: The loader's state, JSON.
            also_keep: Steps whose checkpoints stay besides the newest ones.

        Raises:
            UserError: the disk is full, and other processes do not know it.
            TryAgain: this process failed otherwise, and other processes do not know it.
        """
        self.wait()
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position)
        )
        self._preserve.also, self._saving = frozenset(also_keep), step
        self._agreement.begin()
        failure = None
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:  # of Orbax, TensorStore or the system
            failure = error
        if failure is not None:
            self._failed(failure)

    def wait(self) -> bool:
        """Returns when everything is on disk.

        Returns:
            Whether it is: False after a save that failed, which is warned about.

        Raises:
            UserError: as `save`.
            TryAgain: as `save`.
        """
        failure = None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            failure = error
        if failure is not None:
            self._failed(failure)
            return False
        self._saving = None
        return True

    def _failed(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        # Orbax has forgotten those that it was to delete after this one, and has not deleted them.
        names = (path.name for path in self._directory.iterdir())
        last = max((int(name) for name in names if name.isdigit()), default=None)
        kept = "there is no earlier one" if last is None else f"the one of step {last} stays"
        found = f"the checkpoint of step {step} could not be written ({brief(error)}); {kept}."
        # To open the directory again all processes have to come, and only one of them may know of it.
        if jax.process_count() > 1 and not self._agreement.failed:
            if brief(error) in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)):
                raise UserError(
                    f"{found} Make room; the same command goes on from there."
                ) from error
            raise TryAgain(f"{found} The same command goes on from there.") from error
        with contextlib.suppress(Exception):  # what went wrong is known
            self._manager.close()
        self._manager = self._open()  # which removes the remains, and frees their space
        self._warn(found)

    def _seal(self) -> None:
        """Called by Orbax when all files are written, before they get their final name."""
        if is_first():
            for partial in self._directory.glob(f"{self._saving}{_PARTIAL}*"):
                write_manifest(partial, ignore=_TIMES)

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
            step: One of `steps`.
            like: The state's shapes, dtypes and shardings (`abstract`).

        Returns:
            The state, placed like `like`, and the loader's state.

        Raises:
            UserError: the files are damaged or do not hold such a state.
        """
        # Every byte is read for it, so not twice; later on the answer counts no more.
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
        """What is wrong with the files of a checkpoint, or None. The first process reads them."""
        found = find_damage(self._directory / str(step)) if is_first() else None
        return None if from_first(found is None) else found or "see the first process"

    def newest_intact(self) -> int | None:
        """Step of the newest checkpoint without damage; None when there is no checkpoint.

        Newer ones are warned about and moved to ``damaged-checkpoints`` beside the directory, so
        that their steps can be saved again.

        Raises:
            UserError: there are checkpoints, and all are damaged; they stay where they are.
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
        place = self._directory.with_name(f"damaged-{self._directory.name}")
        for step, damage in damaged.items():
            if is_first():
                place.mkdir(exist_ok=True)
                taken = {path.name for path in place.iterdir()}
                names = (
                    f"{step}-{count}" if count else str(step) for count in range(len(taken) + 1)
                )
                name = next(name for name in names if name not in taken)
                (self._directory / str(step)).rename(place / name)
            self._warn(
                f"the checkpoint of step {step} is damaged ({damage}); going back to the one of "
                f"step {intact}. The damaged one is now in {place}."
            )
        if damaged:
            barrier("damaged checkpoints moved")
            self._manager.reload()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # One of several processes that ends with an error does not wait for the others, who may not
        # come where Orbax waits for them; `train.distributed.join` tells them.
        if error is None or isinstance(error, Stopped) or jax.process_count() == 1:
            self.wait()
            self._manager.close()


class _Preserve(_policies.PreservationPolicy):
    """The newest checkpoints, and named ones. Orbax asks before a save and deletes after it."""

    def __init__(self, keep: int) -> None:
        self.keep, self.also = keep, frozenset[int]()

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: _policies.PreservationContext
    ) -> Sequence[bool]:
        newest = {info.step for info in checkpoints[-self.keep :]}
        return [info.step in newest or info.step in self.also for info in checkpoints]


def _reported_here(record: logging.LogRecord) -> bool:
    return record.exc_info is None or "orbax" not in record.pathname


def _not_of_a_write(record: logging.LogRecord) -> bool:
    """False where asyncio reports one write of a save; the first of them has ended the save."""
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    trace = None if error is None else error.__traceback__
    while trace is not None:
        if "orbax" in trace.tb_frame.f_code.co_filename:
            return False
        trace = trace.tb_next
    return True


def _late_news(unraisable: Any) -> bool:
    """Whether TensorStore told of a write whose save had failed and was given up by then."""
    error = unraisable.exc_value
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _but_late_news(show: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda unraisable: None if _late_news(unraisable) else show(unraisable)


# Orbax logs the traceback of a failed save, which `Checkpoints` reports.
logging.getLogger("absl").addFilter(_reported_here)
logging.getLogger("asyncio").addFilter(_not_of_a_write)
sys.unraisablehook = _but_late_news(sys.unraisablehook)


def restore_params(directory: Path, step: int, like: Any, name: str = "params") -> Any:
    """Reads the parameters of a checkpoint alone, whatever the optimizer was.

    Args:
        directory: As given to `Checkpoints`.
        step: One of `Checkpoints.steps`.
        like: Their shapes, dtypes and shardings.
        name: Their name in the state: params, or ema for their average.
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
    """Shapes, dtypes and places of a state, real or from `jax.eval_shape`.

    Args:
        state: Arrays or `jax.ShapeDtypeStruct`.
        shardings: Tree like `state`, from `train.training.step.state_shardings`; None: all of it in the
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
