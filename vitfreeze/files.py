"""Files that are whole or not there: atomic replacement, content that outlives a power cut, .jsonl files. No torch."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitfreeze.text import find_nearest

logger = logging.getLogger("vitfreeze")
MOST_JSON_BYTES = 64 << 20
QUIET_SECONDS = 600  # for which a reason is not told again


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
    """Return the end of a sentence about a path that is not there: the nearest that is, name by name, if any."""
    meant, is_other = Path(path.anchor), False
    for name in path.relative_to(path.anchor).parts:
        if not (meant / name).exists():
            try:
                name = find_nearest(name, os.listdir(meant))
            except OSError:
                break
            if not name:
                break
            is_other = True
        meant /= name
    return f"; did you mean {str(meant)!r}?" if is_other else ""


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


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise ValueError(f"{path} is larger than {MOST_JSON_BYTES >> 20} MiB, which no file of its kind is")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return parse_json(data, name=str(path))


def parse_json(data: bytes | str, *, name: str) -> Any:
    """Return what JSON says; raises ValueError with the name of the file that is none, or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError(f"{name} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON ({error})") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file that have a step; lines that a kill cut short are left out. No file: none."""
    if not path.is_file():
        return []
    objects = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            read = parse_json(line, name=str(path))
        except ValueError:
            continue
        if isinstance(read, dict) and isinstance(read.get("step"), int):
            objects.append(read)
    return objects


def trim_json_lines(path: Path, *, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a .jsonl file with only the objects that `keep` accepts, in one atomic step."""
    if not path.is_file():
        return
    kept = [format_json(line) + "\n" for line in read_json_lines(path) if keep(line)]
    with replacing(path) as temporary:
        temporary.write_text("".join(kept))


def format_json(value: Any) -> str:
    """Return strict JSON (RFC 8259), in which a number that is not finite is null."""
    return json.dumps(_replace_infinite(value), allow_nan=False)


def _replace_infinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _replace_infinite(item) for name, item in value.items()}
    return [_replace_infinite(item) for item in value] if isinstance(value, list | tuple) else value


class Refusals:
    """Tells of a full disk once, however many files it concerns and however often it has room in between."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}  # when each reason was last met

    def note(self, what: str, *, reason: str) -> None:
        """Note that the system refused something; warn, unless it did for the same reason in the last 10 minutes."""
        now = time.monotonic()
        known = next((seen for seen in self._seen if seen in reason or reason in seen), reason)
        is_news = now - self._seen.get(known, -math.inf) > QUIET_SECONDS
        self._seen[known] = now
        if is_news:
            logger.warning(
                "%s cannot be written (%s); the run goes on, and writes what its logs and checkpoints lack as soon as "
                "it can", what, reason,
            )  # fmt: skip


class RecordFile:
    """A file that whole records are appended to. Those that a full disk refuses wait until there is room.

    The system has every record as soon as `append` returns, so that a killed process loses none.

    Args:
        path: of the file.
        refusals: where those of other files are noted, too.
    """

    def __init__(self, path: Path, *, refusals: Refusals | None = None) -> None:
        self.path = path
        self._refusals = refusals or Refusals()
        self._waiting: list[bytes] = []

    def append(self, record: bytes) -> None:
        """Append a record, after those that wait; never raises OSError, and warns as `Refusals` does."""
        self._waiting.append(record)
        self.flush()

    def flush(self) -> None:
        """Try again to write the records that wait, if any."""
        if not self._waiting:
            return
        size = None
        try:
            with self.path.open("ab") as file:
                size = file.tell()
                file.write(b"".join(self._waiting))
            self._waiting.clear()
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.path, size)  # no half record, on which the next one would be glued
            self._refusals.note(str(self.path), reason=error.strerror or str(error))


class LineFile(RecordFile):
    """A .jsonl file that is appended to, of strict JSON."""

    def append_line(self, line: Mapping[str, Any]) -> None:
        """Append an object."""
        self.append(f"{format_json(line)}\n".encode())
