"""Small files: written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(text: str, path: Path) -> None:
    """Write a text file in one move, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file in one move."""
    write_text(json.dumps(value, indent=1) + "\n", path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a .jsonl file; one that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
