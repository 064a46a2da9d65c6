"""Each sentence of docs/guarantees.md names the test that proves it: the tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMED = re.findall(r"\[([\w/]+\.py)::(\w+)\]", (TESTS.parent / "docs" / "guarantees.md").read_text())


def test_the_page_names_tests() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[name for _, name in NAMED])
def test_named_tests_exist(path: str, name: str) -> None:
    tree = ast.parse((TESTS / path).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert name in functions
