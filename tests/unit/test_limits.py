"""How large a file, a class and a function may be, so that each can be read at one go."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import circuitkit

PACKAGE = Path(circuitkit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LINES, METHODS, BODY = 420, 20, 50  # about 400 lines a file
# A word for each site of a layer: what else would they be called by?
A_WORD_EACH = {"Layer"}


def lines_of_body(function):
    """Without its docstring: what is explained well is not too long."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def methods_of(cls):
    """Without operators and other special ones, which have their names from Python."""
    functions = [each.name for each in cls.body if isinstance(each, ast.FunctionDef)]
    return {name for name in functions if not (name.startswith("__") and name.endswith("__"))}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_can_be_read_at_one_go(path):
    text = path.read_text()
    assert text.count("\n") <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and node.name not in A_WORD_EACH:
            assert len(methods_of(node)) <= METHODS, node.name
        if isinstance(node, ast.FunctionDef):
            assert lines_of_body(node) <= BODY, node.name


def test_what_is_counted():
    source = ast.parse('class A:\n    def __add__(self): ...\n    def f(self):\n        """Doc."""\n\n        a = 1\n        return a\n')
    (cls,) = source.body
    assert methods_of(cls) == {"f"} and lines_of_body(cls.body[1]) == 2
    assert len(FILES) > 200
