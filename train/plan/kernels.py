"""What splash attention, a custom kernel that the compiler does not count, computes and moves.

Its grid is known: it visits the blocks of queries and keys on and below the diagonal. The program's
text tells the sizes of the blocks and the shapes of the operands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from train.plan.hlo import Array, Computation, Instruction

_NAME = re.compile(r"splash_m[hq]a_(fwd|dkv|dq)\w*/pallas_call")
_BLOCKS = {
    "fwd": ("block_q", "block_kv"),
    "dkv": ("block_q_dkv", "block_kv_dkv"),
    "dq": ("block_q_dq", "block_kv_dq"),
}
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
"""Matrix products of a block: QKᵀ and PV; QKᵀ, dV, dP and dK; QKᵀ, dP and dQ."""

_QUERY = 2
"""Operands before the queries: the tables that say which blocks are visited."""


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction runs a custom kernel (Pallas, Mosaic)."""
    return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def splash_cost(instruction: Instruction, computation: Computation) -> tuple[float, float] | None:
    """FLOPs and bytes of main memory of one run of a causal kernel of splash attention.

    Queries, keys and values and their gradients are moved in blocks. A forward or ``dq`` kernel
    fetches keys and values anew for every block of queries, and a ``dkv`` kernel what belongs to the
    queries for every block of keys (FlashAttention-2, Dao 2023). Every other operand and the results
    are moved once; what lies in caches is not counted. None for another kernel, or for sizes that the
    text does not tell.
    """
    found = _NAME.search(instruction.attributes)
    if not found or not is_kernel(instruction):
        return None
    phase = found[1]
    operands = [computation[name].arrays[0] for name in instruction.operands]
    block_q, block_kv = (_block(instruction, name) for name in _BLOCKS[phase])
    if block_q is None or block_kv is None:
        return None
    *heads, length, width = operands[_QUERY].dims
    visited = sum(1 + (row + block_q - 1) // block_kv for row in range(0, length, block_q))
    flops = 2.0 * _PRODUCTS[phase] * math.prod(heads) * visited * block_q * block_kv * width
    moved = sum(array.size for array in (*operands, *instruction.arrays) if array.in_hbm)
    for array, fetched in _fetched_again(phase, operands, visited * block_q, visited * block_kv):
        moved += max(0.0, fetched - 1) * array.size if array.in_hbm else 0.0
    return flops, moved


def _fetched_again(
    phase: str, operands: Sequence[Array], queries: int, keys: int
) -> Iterator[tuple[Array, float]]:
    """Operands that are fetched more than once, and how often, given the rows of blocks of a head."""
    query, *of_keys = operands[_QUERY : _QUERY + 3]
    *heads, length, _ = query.dims
    if phase != "dkv":
        groups = math.prod(heads) / math.prod(of_keys[0].dims[:-2])
        yield from ((array, groups * keys / length) for array in of_keys)
        return
    for array in (query, *operands[_QUERY + 3 :]):
        if list(array.dims[:-2]) == heads:  # what belongs to the queries of each head
            yield array, queries / length


def _block(instruction: Instruction, name: str) -> int | None:
    found = re.search(rf'\W{name}\\*": (\d+)', instruction.attributes)
    return int(found[1]) if found else None
