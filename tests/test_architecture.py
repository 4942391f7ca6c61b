"""ARCHITECTURE.md names every room of the package, and each imports only from those below it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import vitfreeze

PACKAGE = Path(vitfreeze.__file__).parent
CHECKOUT = Path(__file__).parents[1]
# A room stands in a row of the map's table: its name, and a star if it does without torch.
ROWS = re.findall(r"^\| `(\w+)`( \*)? \| (.+) \|$", (CHECKOUT / "ARCHITECTURE.md").read_text(), flags=re.MULTILINE)
ROOMS = [name for name, _, _ in ROWS]
TORCH_FREE = {name for name, star, _ in ROWS if star}
ENTRANCES = {"__init__", "__main__"}  # the version; `python -m vitfreeze`


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


def test_the_map_has_every_room_once_and_no_other() -> None:
    there = {room_of(path) for path in PACKAGE.rglob("*.py")} - ENTRANCES
    assert sorted(ROOMS) == sorted(there)


def test_the_map_and_the_readme_name_what_there_is() -> None:
    """Names in backticks that end on .py, .sh, .md or a slash are files and folders of the checkout or of a room."""
    for page in ("ARCHITECTURE.md", "README.md"):
        for name in re.findall(r"`([\w./-]+(?:\.py|\.sh|\.md|/))`", (CHECKOUT / page).read_text()):
            assert (CHECKOUT / name).exists() or (PACKAGE / name).exists(), f"{page} names {name}, which is not there"
    (modules,) = (text for name, _, text in ROWS if name == "training")
    for name in re.findall(r"`(\w+)`", modules):
        assert (PACKAGE / "training" / f"{name}.py").is_file(), f"the map names training/{name}.py, which is not there"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_from_below(path: Path) -> None:
    room = room_of(path)
    if room in ENTRANCES:
        return
    for name in imported_modules(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "deepspeed":
            assert room == "engine", f"{path.name} imports deepspeed; only engine may"
        if parts[0] in ("torch", "torchvision", "timm"):
            assert room not in TORCH_FREE, f"{path.name} imports {parts[0]}, which takes seconds to load"
        if parts[0] == "vitfreeze" and len(parts) > 1 and parts[1] != room and parts[1] != "__version__":
            assert ROOMS.index(parts[1]) > ROOMS.index(room), f"{room} imports {parts[1]}, which is above it in the map"
        assert parts[0] != "data_prep", f"{path.name} imports data_prep"


def test_data_prep_stands_alone() -> None:
    for path in sorted((PACKAGE.parent / "data_prep").rglob("*.py")):
        names = imported_modules(ast.parse(path.read_text()))
        assert not any(name.split(".")[0] == "vitfreeze" for name in names), f"{path.name} imports vitfreeze"
