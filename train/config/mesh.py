"""How the devices of a run are arranged."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.ranges import PositiveInt


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How many devices split what; their product is the number of devices that are used.

    Attributes:
        data: Groups of devices that each hold the whole model between them, and a part of every
            batch. Slices of TPUs that a network joins are such groups, so with several of them it is
            a multiple of their number. Unset: that number, 1 on a single slice and on GPUs.
        fsdp: Devices over which parameters, optimizer state and delta are split, and batches too.
            Unset: all the devices that `data` and `tensor` leave.
        tensor: Devices over which heads, feed-forward channels and vocabulary are split, and the
            sequence between the layers. Keep it within the fastest links.
    """

    data: PositiveInt | None = None
    fsdp: PositiveInt | None = None
    tensor: PositiveInt = 1
