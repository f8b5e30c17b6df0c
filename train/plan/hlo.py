"""Reads the text of a compiled XLA program: computations, their instructions, and trips of loops."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")
_CALLS = re.compile(
    r"(calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_END = re.compile(r'\}(, execution_thread="[^"]*")?$')


class Array(NamedTuple):
    """One array of a shape."""

    dims: tuple[int, ...]
    size: float  # bytes, without the padding of tiles
    in_hbm: bool  # in the main memory of the device rather than in its caches


@dataclass(frozen=True)
class Instruction:
    """One line of a computation, such as ``ROOT %name = shape opcode(%operand), attributes``."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]  # names of the instructions it reads
    literal: str  # the text between the brackets, such as the value of a constant
    attributes: str
    is_root: bool  # whether it is the result of its computation

    def called(self, role: str) -> str | None:
        """The computation called as ``"calls"``, ``"body"``, ``"condition"`` …, if any."""
        return dict(_CALLS.findall(self.attributes)).get(role)

    def branches(self) -> list[str]:
        """The computations that a conditional chooses from."""
        found = _BRANCHES.search(self.attributes)
        names = _NAME.findall(found[1]) if found else []
        sides = (self.called("true_computation"), self.called("false_computation"))
        return [*names, *(side for side in sides if side is not None)]


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]  # by name, each with its instructions in order
    entry: str  # name of the computation that runs


def parse(text: str) -> Module:
    """Reads ``compiled.as_text()``; raises `ValueError` where it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _lines(text):
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif _END.match(line):
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the compiler's text has no ENTRY computation.")
    return Module(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """The lines of the text; an attribute over several lines (a kernel's configuration) is joined."""
    whole = ""
    for line in text.splitlines():
        if line.startswith(("}}", '"')):
            whole += line
            continue
        yield whole
        whole = line
    yield whole


def _instruction(line: str) -> Instruction:
    left, right = line.split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    return Instruction(
        name=_NAME.findall(left)[0],
        opcode=rest[:start],
        arrays=tuple(arrays(shape)),
        operands=tuple(_NAME.findall(inside)),
        literal=inside,
        attributes=rest[stop + 1 :],
        is_root=left.lstrip().startswith("ROOT"),
    )


def _closing(text: str, start: int) -> int:
    """Position of the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        if text[position] == "(":
            depth += 1
        elif text[position] == ")":
            depth -= 1
            if depth == 0:
                return position
    raise ValueError(f"brackets do not close: {text[:200]}")


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, a tuple's in order.

    Example:
        >>> arrays("(bf16[2,3]{1,0:T(8,128)S(1)}, pred[])")
        [Array(dims=(2, 3), size=12.0, in_hbm=False), Array(dims=(), size=1.0, in_hbm=True)]
    """
    found = []
    for kind, dims, layout in _ARRAY.findall(shape):
        axes = tuple(int(size) for size in dims.split(",") if size)
        digits = re.search(r"\d+", kind)
        bits = _BITS.get(kind, int(digits[0]) if digits else 0)
        in_hbm = not _ELSEWHERE.search(layout)
        found.append(Array(axes, math.prod(axes) * bits / 8, in_hbm))
    return found


def trips(module: Module, computation: Computation, loop: Instruction) -> int:
    """How often the body of a ``while`` runs, as the compiler says or a constant counter implies.

    Raises `ValueError` where the text does not tell.
    """
    said = _TRIPS.search(loop.attributes)
    if said:
        return int(said[1])
    condition = module.computations[loop.called("condition") or ""]
    body = module.computations[loop.called("body") or ""]
    test = _compared(condition)
    if test is None:
        raise ValueError(f"the trips of loop {loop.name} are not constant.")
    index, limit, inclusive = test
    first = _at(computation, loop.operands[0], index)
    step = _step(body, index)
    if first is None or step is None:
        raise ValueError(f"the start or the step of loop {loop.name} is not constant.")
    return max(0, math.ceil((limit + inclusive - first) / step))


def _source(computation: Computation, name: str | None) -> Instruction | None:
    """The instruction whose value this is, with copies and conversions left out."""
    instruction = computation.get(name or "")
    while instruction is not None and instruction.opcode in ("copy", "convert", "bitcast"):
        instruction = computation.get(instruction.operands[0])
    return instruction


def _constant(computation: Computation, name: str | None) -> int | None:
    """The value of an instruction that is a constant integer, else None."""
    found = _source(computation, name)
    if found is None or found.opcode != "constant":
        return None
    return int(found.literal) if re.fullmatch(r"-?\d+", found.literal) else None


def _element(computation: Computation, name: str) -> int | None:
    """The index of the element of the loop's tuple that an instruction reads."""
    found = _source(computation, name)
    if found is None or found.opcode != "get-tuple-element":
        return None
    return int(re.findall(r"index=(\d+)", found.attributes)[0])


def _compared(condition: Computation) -> tuple[int, int, int] | None:
    """The counter of ``counter < limit``, the limit, and 1 where the limit is included."""
    compares = [i for i in condition.values() if i.opcode == "compare"]
    test = next((i for i in compares if i.is_root), compares[0] if len(compares) == 1 else None)
    if test is None:
        return None
    direction = re.findall(r"direction=(\w+)", test.attributes)[0]
    index, limit = _element(condition, test.operands[0]), _constant(condition, test.operands[1])
    if index is None or limit is None or direction not in ("LT", "LE"):
        return None
    return index, limit, int(direction == "LE")


def _at(computation: Computation, name: str, index: int) -> int | None:
    """The value of an element of a tuple, where it is a constant integer."""
    instruction = computation.get(name)
    if instruction is None or instruction.opcode != "tuple":
        return None
    return _constant(computation, instruction.operands[index])


def _step(body: Computation, index: int) -> int | None:
    """The constant that a loop's body adds to an element of its tuple."""
    root = next(i for i in body.values() if i.is_root)
    added = _source(body, root.operands[index]) if root.opcode == "tuple" else None
    if added is None or added.opcode != "add":
        return None
    for counter, step in (added.operands, added.operands[::-1]):
        if _element(body, counter) == index:
            return _constant(body, step)
    return None
