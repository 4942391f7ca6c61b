"""Files that are whole or not there: atomic replacement, content that outlives a power cut, .jsonl files. No torch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitfreeze.text import find_nearest

logger = logging.getLogger("vitfreeze")


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a name beside `path` to write to; what was written takes its place at once, when it is whole.

    `shared` says that other processes may write the same file now; each then has a name of its own.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new" if shared else f".{path.name}.new")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def suggest_path(path: Path) -> str:
    """Return the end of a sentence about a path that is not there: its neighbour with the nearest name, if any."""
    try:
        there = [item.name for item in path.parent.iterdir()]
    except OSError:
        return ""
    nearest = find_nearest(path.name, there)
    return f"; did you mean {str(path.with_name(nearest))!r}?" if nearest else ""


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Give a file new content in one atomic step that survives a power cut."""
    with replacing(path) as temporary:
        write_durably(temporary, data)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Wait until the disk has a file's content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file; a last line that a kill cut short is left out. No file: no objects."""
    if not path.is_file():
        return []
    objects = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return objects


def trim_json_lines(path: Path, *, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a .jsonl file with only the objects that `keep` accepts, in one atomic step."""
    if not path.is_file():
        return
    kept = [json.dumps(line) + "\n" for line in read_json_lines(path) if keep(line)]
    with replacing(path) as temporary:
        temporary.write_text("".join(kept))


class LineFile:
    """A .jsonl file that is appended to. Lines that a full disk refuses wait and are written when there is room."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def append(self, line: Mapping[str, Any]) -> None:
        """Append an object, after those that wait; never raises OSError."""
        was_refused = bool(self._waiting)
        self._waiting.append(json.dumps(line) + "\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.writelines(self._waiting)
            self._waiting.clear()
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)  # no half line, on which the next one would be glued
            if not was_refused:
                logger.warning("%s cannot be written (%s); its lines wait for room", self.path, error.strerror)
