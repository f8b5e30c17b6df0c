"""What a compiled program computes, moves and sends, with every loop's body as often as it runs.

XLA's own ``cost_analysis`` counts the body of a loop once, and a decoder is a loop over its layers.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

from train.plan.hlo import Array, Computation, Instruction, Module, parse, trips
from train.plan.kernels import is_kernel, splash_cost
from train.plan.network import transferred

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_VIEWS = ("bitcast", "get-tuple-element", "tuple", "parameter", "constant", "after-all")
_FREE = (*_VIEWS, "partition-id", "replica-id", "iota", "opt-barrier", "custom-call")
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass
class Cost:
    """What one run of a program, or of a part of it, costs one chip.

    `hbm_bytes` are read from and written to the chip's main memory. An operand of which a fusion
    takes a slice counts by the slice, and an array updated in place by the update.

    `sent` has the bytes that each kind of collective brings from other chips, with the best known
    algorithm on ``n`` chips: ``(n − 1)/n`` of the result for a gather, of the operand for a scatter,
    and both for an all-reduce. `network` has those that come from other slices, and `sent` does not.

    The compiler does not count custom kernels (Pallas); the cost of splash attention's is in
    `train.plan.kernels`.
    """

    flops: float = 0.0  # twice the multiplications of matrix products
    hbm_bytes: float = 0.0
    sent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    network: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    loops: tuple[str, ...] = ()  # those whose trips are unknown; their bodies count once
    kernels: tuple[str, ...] = ()  # those of unknown cost, which are left out

    def add(self, other: Cost, times: int = 1) -> None:
        """Adds `times` runs of another part."""
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        for mine, others in ((self.sent, other.sent), (self.network, other.network)):
            for kind, size in others.items():
                mine[kind] += times * size
        self.loops += other.loops
        self.kernels += other.kernels


def program_cost(text: str, chips: int, *, slices: int = 1, count_loops: bool = True) -> Cost:
    """The cost on each chip of a compiled program, given ``compiled.as_text()``.

    `chips` counts those of one slice. Without `count_loops` every body counts once, as in XLA's
    ``cost_analysis``.
    """
    module = parse(text)
    return _Walk(module, chips, slices, count_loops).of(module.entry)


class _Walk:
    """Adds up the costs of a program's computations, each of which is read once."""

    def __init__(self, module: Module, chips: int, slices: int, count_loops: bool) -> None:
        self.module, self.chips, self.slices = module, chips, slices
        self.count_loops = count_loops
        self.known: dict[str, Cost] = {}

    def of(self, name: str | None) -> Cost:
        """The cost of one run of a computation, of the entry for None."""
        name = self.module.entry if name is None else name
        if name not in self.known:
            total = Cost()
            computation = self.module.computations[name]
            for instruction in computation.values():
                self._add(total, computation, instruction)
            self.known[name] = total
        return self.known[name]

    def _add(self, total: Cost, computation: Computation, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            self._add_loop(total, computation, instruction)
        elif opcode == "conditional":
            costs = [self.of(name) for name in instruction.branches()]
            total.add(max(costs, key=lambda cost: (cost.flops, cost.hbm_bytes), default=Cost()))
        elif opcode in ("call", "async-start"):
            total.add(self.of(instruction.called("to_apply") or instruction.called("calls")))
        elif opcode == "fusion":
            self._add_inside(total, self._inside(instruction))
            total.hbm_bytes += self._fusion_bytes(computation, instruction)
        elif kind := collective(instruction):
            total.sent[kind] += sent(instruction, computation, self.chips)
            total.hbm_bytes += 2 * _result(instruction)
        elif opcode in ("send", "recv"):
            self._add_transfer(total, instruction)
        elif is_kernel(instruction):
            cost = splash_cost(instruction, computation)
            total.add(Cost(kernels=(instruction.name,)) if cost is None else Cost(*cost))
        elif not opcode.endswith("-done") and opcode not in _FREE:
            total.flops += flops(instruction, computation)
            total.hbm_bytes += _plain_bytes(computation, instruction)

    def _add_loop(self, total: Cost, computation: Computation, loop: Instruction) -> None:
        times = 1
        if self.count_loops:
            try:
                times = trips(self.module, computation, loop)
            except ValueError:
                total.loops += (loop.name,)
        total.add(self.of(loop.called("body")), times)

    def _add_transfer(self, total: Cost, instruction: Instruction) -> None:
        value = instruction.arrays[0]  # of a tuple with a context and a token
        total.hbm_bytes += value.size * value.in_hbm
        if found := transferred(instruction, self.slices):
            kind, size = found
            total.network[kind] += size

    def _inside(self, fusion: Instruction) -> Computation:
        return self.module.computations[fusion.called("calls") or ""]

    def _add_inside(self, total: Cost, inside: Computation) -> None:
        """Adds the products and collectives of a fusion; its other work moves nothing."""
        users = _users(inside)
        for instruction in inside.values():
            if instruction.opcode == "fusion":
                self._add_inside(total, self._inside(instruction))
            total.flops += flops(instruction, inside)
            kind = collective(instruction)
            if kind is None or not _starts(instruction, users):
                continue
            size = sent(instruction, inside, self.chips)
            if kind == "all-reduce" and _only_sliced(users, instruction):
                kind, size = "reduce-scatter", size / 2
            total.sent[kind] += size
            total.hbm_bytes += 2 * _result(instruction)

    def _fusion_bytes(self, computation: Computation, fusion: Instruction) -> float:
        inside = self._inside(fusion)
        users = _users(inside)
        parameters = {int(i.literal): i for i in inside.values() if i.opcode == "parameter"}
        total = 0.0
        for number, name in enumerate(fusion.operands):
            operand = computation[name]
            if operand.arrays and operand.arrays[0].in_hbm and number in parameters:
                total += _read(inside, users, parameters[number])
        root = next(i for i in inside.values() if i.is_root)
        if "AsyncCollective" in root.attributes:
            return 0.0
        results = [inside[n] for n in root.operands] if root.opcode == "tuple" else [root]
        for result, array in zip(results, fusion.arrays, strict=False):
            if array.in_hbm:
                total += _written(inside, result, array)
        return total


def _users(computation: Computation) -> dict[str, list[Instruction]]:
    users: defaultdict[str, list[Instruction]] = defaultdict(list)
    for instruction in computation.values():
        for name in instruction.operands:
            users[name].append(instruction)
    return users


def _read(inside: Computation, users: dict[str, list[Instruction]], value: Instruction) -> float:
    """Bytes that a fusion reads of a parameter."""
    whole, total = sum(array.size for array in value.arrays), 0.0
    for user in users.get(value.name, []):
        if user.opcode in _SLICES and user.operands[0] == value.name:
            total += sum(array.size for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode == "bitcast":
            total += _read(inside, users, user)
        elif user.opcode == "tuple" or collective(user):
            continue
        else:
            return whole
    return min(whole, total)


def _written(inside: Computation, result: Instruction, array: Array) -> float:
    """Bytes that a fusion writes of a result."""
    while result.opcode == "bitcast":
        result = inside[result.operands[0]]
    if result.opcode == "parameter" or collective(result):
        return 0.0
    if result.opcode == "dynamic-update-slice":
        return sum(a.size for a in inside[result.operands[1]].arrays)
    return array.size


def _plain_bytes(computation: Computation, instruction: Instruction) -> float:
    """Bytes of main memory that an instruction outside of fusions reads and writes."""
    opcode = instruction.opcode
    if opcode in (*_SLICES, "slice-start"):
        written = instruction.arrays if opcode != "slice-start" else instruction.arrays[1:2]
        source = computation[instruction.operands[0]].arrays
        ends_in_hbm = any(a.in_hbm for a in source) + any(a.in_hbm for a in written)
        return ends_in_hbm * sum(array.size for array in written)
    if opcode == "dynamic-update-slice":
        return 2 * sum(a.size for a in computation[instruction.operands[1]].arrays if a.in_hbm)
    if opcode == "copy-start":
        return sum(array.size for array in instruction.arrays[:2] if array.in_hbm)
    names = instruction.operands
    read = sum(a.size for name in names for a in computation[name].arrays if a.in_hbm)
    return read + sum(array.size for array in instruction.arrays if array.in_hbm)


def _result(instruction: Instruction) -> float:
    """Bytes of the results of a collective, without the operands that an asynchronous one repeats."""
    found, count = instruction.arrays, len(instruction.operands)
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        # The runtime's own arrays follow; a permutation in place has four operands and two results.
        found = found[count : 2 * count] or found[1:2] or found
    return sum(array.size for array in found)


def collective(instruction: Instruction) -> str | None:
    """The kind of collective that an instruction is or starts."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def sent(instruction: Instruction, computation: Computation, chips: int) -> float:
    """Bytes that a collective brings to each chip from others."""
    kind, size = collective(instruction), _result(instruction)
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    others = 1 - 1 / group_size(instruction.attributes, chips)
    if kind == "all-reduce":
        return 2 * size * others
    if kind == "reduce-scatter":
        size = sum(a.size for name in instruction.operands for a in computation[name].arrays)
    return size * others


def group_size(attributes: str, chips: int) -> int:
    """How many chips take part in one group of a collective.

    Example:
        >>> group_size("replica_groups=[8,2]<=[16]", 16), group_size("replica_groups={{0,1,2}}", 3)
        (2, 3)
    """
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=@?\w*\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return chips


def _starts(instruction: Instruction, users: dict[str, list[Instruction]]) -> bool:
    """False where a fusion only lets a collective go on that an earlier one has started."""
    if "chain_id" not in instruction.attributes:
        return True
    reached = users.get(instruction.name, [])
    return any("AsyncCollectiveStart" in user.attributes for user in reached)


def _only_sliced(users: dict[str, list[Instruction]], instruction: Instruction) -> bool:
    """Whether a chip keeps only its part of an all-reduce, which is then sent as a scatter."""
    names, found = [instruction.name], []
    while names:
        for user in users.get(names.pop(), []):
            if user.opcode == "bitcast":
                names.append(user.name)
            else:
                found.append(user.opcode)
    return bool(found) and set(found) <= {"dynamic-slice"}


def flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of a matrix product, which compilers for TPUs write as a convolution; else 0."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (computation[name].arrays[0].dims for name in instruction.operands[:2])
    out = math.prod(instruction.arrays[0].dims)
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(axis) for axis in axes[1].split(",") if axis] if axes else []
        return 2.0 * out * math.prod(left[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.attributes
    dims = (left, right, instruction.arrays[0].dims)
    image, kernel, result = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), dims, strict=True)
    )
    summed = kernel["i"]
    for axis in (name for name in kernel if name.isdigit()):
        if image[axis] == kernel[axis] and result[axis] == 1:
            summed *= kernel[axis]
    return 2.0 * out * summed
