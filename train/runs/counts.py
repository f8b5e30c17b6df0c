"""How many steps a run has, and whether its batches can be split as they are to be."""

from __future__ import annotations

from jax.sharding import Mesh

from train.config import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    OnlineDPOConfig,
    SFTConfig,
    TrainerOptions,
    UserError,
)
from train.distributed.batches import check_batch


def check_rows(
    config: SFTConfig | DPOConfig | KTOConfig | OnlineDPOConfig | GRPOConfig, mesh: Mesh | None
) -> None:
    """Raises `UserError` when a batch cannot be split over the mesh, and into its parts."""
    size, parts = config.trainer.batch_size, config.trainer.gradient_accumulation_steps
    if isinstance(config, GRPOConfig):
        check_batch("trainer.batch_size", size, mesh)
        answers = size * config.sampling.num_generations
        check_batch("trainer.batch_size * sampling.num_generations", answers, mesh, parts)
    else:
        check_batch("trainer.batch_size", size, mesh, parts)


def count_steps(options: TrainerOptions, rows: int, per_batch: int = 1) -> int:
    """Number of updates.

    Args:
        options: Steps or epochs, and the rows of a batch.
        rows: In an epoch.
        per_batch: Updates on every batch.

    Raises:
        UserError: there are fewer rows than a batch has, or less than one step results.
    """
    if options.batch_size > rows:
        raise UserError(
            f"trainer.batch_size is {options.batch_size}, but there are only {rows} training rows; "
            "use a smaller batch or more data."
        )
    if options.steps is not None:
        return options.steps
    assert options.epochs is not None
    steps = round(options.epochs * (rows // options.batch_size)) * per_batch
    if steps < 1:
        raise UserError(f"trainer.epochs {options.epochs} makes no step of {rows} rows.")
    return steps
