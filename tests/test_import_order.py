"""The rooms of the package may only look upward."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vitfreeze

PACKAGE = Path(vitfreeze.__file__).parent
FLOORS = [
    *("files", "text", "architecture", "config", "schedule", "planner", "report", "gpu"),
    *("model", "rendezvous", "data", "engine"),
    *("plots", "checkpoint", "pretrained", "fault_tolerance", "export", "evaluate"),
    *("training", "doctor", "bench", "cli", "__main__"),
]
TORCH_FREE = {"files", "text", "architecture", "config", "schedule", "planner"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside the package are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upward(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in FLOORS, f"{path.name} has no floor: give it one in FLOORS"
    for name in imported_modules(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "deepspeed":
            assert room == "engine", f"{path.name} imports deepspeed; only engine may"
        if parts[0] in ("torch", "torchvision", "timm"):
            assert room not in TORCH_FREE, f"{path.name} imports {parts[0]}, which takes seconds to load"
        if parts[0] == "vitfreeze" and len(parts) > 1 and parts[1] != room and parts[1] != "__version__":
            assert FLOORS.index(parts[1]) < FLOORS.index(room), f"{room} imports {parts[1]}, which lies below it"
        assert parts[0] != "data_prep", f"{path.name} imports data_prep"


def test_data_prep_stands_alone() -> None:
    for path in sorted((PACKAGE.parent / "data_prep").rglob("*.py")):
        names = imported_modules(ast.parse(path.read_text()))
        assert not any(name.split(".")[0] == "vitfreeze" for name in names), f"{path.name} imports vitfreeze"
