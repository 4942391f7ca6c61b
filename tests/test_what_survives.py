"""The page of promises names tests that exist, and says of slow ones that they are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "what_survives.md"


def find_tests() -> dict[str, bool]:
    """Return whether each test is marked slow as a whole, by name."""
    found = {}
    for path in TESTS.rglob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = any(ast.unparse(mark) == "pytest.mark.slow" for mark in node.decorator_list)
    return found


def test_every_test_that_the_page_names_exists() -> None:
    tests, named = find_tests(), re.findall(r"`(test_\w+)`", PAGE.read_text())
    assert len(named) > 40
    assert sorted(set(named) - tests.keys()) == []


def test_the_page_says_which_tests_are_slow() -> None:
    tests = find_tests()
    for line in PAGE.read_text().splitlines():
        for name in re.findall(r"`(test_\w+)`", line):
            assert tests[name] == ("slow" in line.split(f"`{name}`")[0].rpartition("|")[2]), name
