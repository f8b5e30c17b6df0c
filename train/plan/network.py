"""What crosses the network between slices or hosts: by a compiled program, or by arithmetic.

On several slices the TPU compiler writes a program for the chips of one. A collective over slices
becomes one within the slice and a transfer by the Megascale runtime, a ``send`` and a ``recv`` that
name it, of the chip's part alone.
"""

from __future__ import annotations

import re

from train.plan.hlo import Instruction

_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


def transferred(instruction: Instruction, slices: int) -> tuple[str, float] | None:
    """The kind of collective whose data a ``recv`` brings to a chip over the network, and its bytes.

    With the best known algorithm and ``n`` slices an all-reduce takes ``2 (n − 1)/n`` of the array, and
    a scatter ``n − 1`` times what is left of it. None for any other instruction.
    """
    found = _TRANSFER.search(instruction.attributes)
    if instruction.opcode != "recv" or found is None:
        return None
    others = 1 - 1 / slices
    kind, share = {
        "ALL_REDUCE": ("all-reduce", 2 * others),
        "ALL_GATHER": ("all-gather", others),
        "ALL_TO_ALL": ("all-to-all", others),
        "REDUCE_SCATTER": ("reduce-scatter", slices - 1.0),
        "ONE_TO_ONE": ("collective-permute", 1.0),
    }.get(found[1], (found[1], 1.0))
    return kind, share * instruction.arrays[0].size


def crossing(size: float, chips: int, stride: int, node: int) -> float:
    """Bytes that a gather or a scatter brings to a chip from other nodes.

    Members of a group that share a node each fetch their part of what the node lacks, and pass it on
    within it. `size` is the bytes of what is gathered, twice that for an all-reduce; `chips` are those
    of the group, `stride` apart in the order in which chips lie in nodes of `node` chips; 0 stands for
    a single node.

    Example:
        >>> crossing(16e9, chips=16, stride=1, node=8) / 1e9
        1.0
        >>> crossing(16e9, chips=8, stride=1, node=8)
        0.0
    """
    if not node:
        return 0.0
    together = min(chips, max(1, node // stride))
    return size * (1 - together / chips) / together
