"""Checkpoints of the training state and of the position in the data, written in the background."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.config import UserError
from train.step import State


class Checkpoints:
    """Saves and restores ``{"params", "opt_state", "step"}`` together with the loader's state.

    A checkpoint is written under a temporary name and renamed when it is complete, and an older one
    is deleted only after that, so a kill at any moment leaves the last complete one in place. What
    a killed save left behind is removed when the directory is opened again.

    Args:
        directory: Made when it does not exist.
        every: Save at multiples of this step; None: only when told to.
        keep: Newest checkpoints that stay.
        read_only: Leave the directory as it is; nothing can be saved.

    Example:
        >>> with Checkpoints(directory, every=100, keep=2) as checkpoints:  # doctest: +SKIP
        ...     checkpoints.save(100, state, loader.get_state())
        ...     state, position = checkpoints.restore(100, abstract_state)
    """

    def __init__(
        self, directory: Path, *, every: int | None = None, keep: int = 1, read_only: bool = False
    ) -> None:
        policies = ocp.checkpoint_managers
        interval = (
            policies.FixedIntervalPolicy(every) if every else policies.SpecificStepsPolicy(())
        )
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=interval,
            preservation_policy=policies.LatestN(keep),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def due(self, step: int) -> bool:
        """Whether `step` is one to save at."""
        return self._manager.should_save(step)

    def save(self, step: int, state: State, position: dict[str, Any]) -> None:
        """Starts writing a checkpoint; the state may be donated as soon as this returns.

        Args:
            step: Updates done so far.
            state: The training state.
            position: The loader's state, JSON.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position)
        )
        self._manager.save(step, args=arguments, force=True)

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
            step: One of `steps`.
            like: The state's shapes, dtypes and shardings (`abstract`).

        Returns:
            The state, placed like `like`, and the loader's state.

        Raises:
            UserError: the files do not hold such a state.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=arguments)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint {step} in {self._manager.directory} cannot be restored: {error}"
            ) from error
        return restored["state"], restored["data"]

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()


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
        shardings: Tree like `state`, from `train.step.state_shardings`; None: one device.
    """
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, state)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        shardings,
    )
