"""The limits that keep the code readable: sizes of files and functions, and numbers of parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import omerge_jax

ROOT = Path(__file__).parents[1]
FILES = [
    path.relative_to(ROOT)
    for package in ("omerge_jax", "train")
    for path in sorted((ROOT / package).rglob("*.py"))
]
FILE_LINES, FUNCTION_LINES, PARAMETERS, ROOT_FILES = 400, 60, 10, 4


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_public_factory(path: Path, name: str) -> bool:
    """What users call with keywords: its arguments are the interface, its docstring the manual."""
    return path.parts[0] == "omerge_jax" and name in omerge_jax.__all__


def docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    if ast.get_docstring(function) is None:
        return 0
    return (first.end_lineno or first.lineno) - first.lineno + 1


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short(path):
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= FILE_LINES, f"{path} has {lines} lines"
    for function in functions(path):
        public = is_public_factory(path, function.name)
        number = length(function) - (docstring_lines(function) if public else 0)
        assert number <= FUNCTION_LINES, f"{path}: {function.name} has {number} lines"
        if not public:
            number = parameters(function)
            assert number <= PARAMETERS, f"{path}: {function.name} has {number} parameters"


def test_the_root_of_the_trainer_is_the_command_line_and_shared_types():
    assert len(list((ROOT / "train").glob("*.py"))) <= ROOT_FILES
