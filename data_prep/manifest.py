"""What a folder of shards says of itself: settings, checksums, and the journal that lets a killed run go on.

While packing runs, `packing.jsonl` holds the settings and a line for every finished shard. At the end the description
files are written, `manifest.json` last, and the journal goes away.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from data_prep.errors import InputError, OutputError
from data_prep.json_text import parse_json
from data_prep.shards import PARTIAL_SUFFIX, ShardEntry, sync_folder

FORMAT = 1
MANIFEST = "manifest.json"
JOURNAL = "packing.jsonl"
INFO = "_info.json"
SIZES = "sizes.json"
SKIPPED = "skipped.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifest:
    """Settings that decide every byte of the shards, and the shards that are finished."""

    settings: Mapping[str, Any]
    shards: Sequence[ShardEntry]

    @property
    def classes(self) -> list[str]:
        return list(self.settings["classes"])


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished folder; None if there is none.

    Raises:
        InputError: it is there and cannot be understood.
    """
    path = folder / MANIFEST
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise InputError(f"{path} has format {content['format']}, this program reads format {FORMAT}.")
        return Manifest(content["settings"], [ShardEntry(**entry) for entry in content["shards"]])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({_explain(error)}).") from error


def _explain(error: Exception) -> str:
    """Say what is missing of a file's parts by name; other errors say it themselves."""
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def require_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder.

    Raises:
        InputError: there is none, with the reason, or it cannot be understood.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}.")
    if (folder / JOURNAL).exists():
        raise InputError(f"packing into {folder} is not finished: give the packing command again.")
    raise InputError(f"{folder} holds no {MANIFEST}: it was not made by this program.")


class Journal:
    """The append-only record of a packing run; it also keeps a second run out of the folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open the folder for packing with these settings; `finished` then tells which shards are known to be done.

        Raises:
            InputError: the folder holds the work of another command, or another process is packing into it.
            OutputError: the folder cannot be written.
        """
        self.folder = folder
        manifest = read_manifest(folder)
        if manifest is not None:
            _refuse_other_settings(folder, manifest.settings, settings)
        elif not (folder / JOURNAL).exists():
            _refuse_foreign_files(folder)
        try:
            # without a buffer, so that nothing is left to be written when the file is closed after an error
            self._file = open(folder / JOURNAL, "a+b", buffering=0)  # noqa: SIM115  # closed by __exit__
        except OSError as error:
            raise OutputError(f"cannot write into {folder}: {error.strerror}.") from error
        try:
            self._lock()
            self.finished = self._take_over(settings, manifest)
            self._remove_partial_files()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_partial_files()  # of workers that were ended
        self._file.close()

    def add(self, entry: ShardEntry) -> None:
        """Record a finished shard."""
        self._append(entry.to_json())

    def remove(self) -> None:
        """Packing is complete and the manifest says so."""
        (self.folder / JOURNAL).unlink()

    def _remove_partial_files(self) -> None:
        for stale in self.folder.glob(f".*{PARTIAL_SUFFIX}"):
            stale.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is packing into {self.folder}.") from error
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): do not start a second run on it", self.folder, error.strerror)

    def _take_over(self, settings: Mapping[str, Any], manifest: Manifest | None) -> dict[str, ShardEntry]:
        known = manifest or self._read_back()
        if known is None or known is manifest:
            self._file.truncate(0)
            self._append({"format": FORMAT, "settings": settings})
        else:
            _refuse_other_settings(self.folder, known.settings, settings)
        return {entry.name: entry for entry in known.shards} if known is not None else {}

    def _read_back(self) -> Manifest | None:
        """What an earlier run has recorded; a last line that a crash has torn is cut off."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        try:
            lines = [parse_json(line) for line in content[:whole].splitlines()]
            if len(lines) < 2 and not any(self.folder.glob("*.tar")):
                return None  # that run had only begun
            return Manifest(lines[0]["settings"], [ShardEntry(**line) for line in lines[1:]])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{self.folder / JOURNAL} is damaged: delete the folder and start again.") from error

    def _append(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line).encode("ascii") + b"\n"
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.folder / JOURNAL}: {error.strerror}.") from error


def _refuse_foreign_files(folder: Path) -> None:
    foreign = sorted(path.name for path in folder.glob("*.tar"))
    foreign += [name for name in (INFO, SIZES, SKIPPED) if (folder / name).exists()]
    if foreign:
        raise InputError(
            f"{folder} holds {foreign[0]}, which no unfinished run of this program has left there: give an empty "
            "folder."
        )


def _refuse_other_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if name == "splits":
            what = f"other images ({_describe_splits(before)}; now {_describe_splits(now)})"
        elif name == "classes":
            what = f"other classes ({len(before or ())} of them; now {len(now or ())})"
        else:
            what = f"{name} = {before} (now {now})"
        raise InputError(
            f"{folder} holds shards made with {what}: give another folder, or delete it; nothing was changed."
        )


def _describe_splits(splits: Mapping[str, Any] | None) -> str:
    parts = (f"{name}: {facts['images']} images, {facts['sha256'][:8]}" for name, facts in (splits or {}).items())
    return ", ".join(parts) or "none"


def write_descriptions(folder: Path, *, dataset: str, manifest: Manifest) -> None:
    """Write `_info.json` (timm), `sizes.json` (open_clip), `skipped.jsonl`, and last `manifest.json`.

    Raises:
        OutputError: one of them cannot be written.
    """
    splits, sizes = describe_shards(manifest)
    skipped = [json.dumps(line) + "\n" for entry in manifest.shards for line in entry.skipped]
    shards = [entry.to_json() for entry in manifest.shards]
    content = {"format": FORMAT, "settings": manifest.settings, "shards": shards}
    _replace_file(folder / INFO, json.dumps({"name": dataset, "splits": splits}, indent=1))
    _replace_file(folder / SIZES, json.dumps(sizes, indent=1))
    _replace_file(folder / SKIPPED, "".join(skipped))
    _replace_file(folder / MANIFEST, json.dumps(content, indent=1))


def describe_shards(manifest: Manifest) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """The splits for `_info.json` and the counts for `sizes.json`."""
    splits: dict[str, dict[str, Any]] = {}
    for entry in manifest.shards:
        info = splits.setdefault(
            entry.split, {"name": entry.split, "num_samples": 0, "filenames": [], "shard_lengths": []}
        )
        info["num_samples"] += entry.num_samples
        info["filenames"].append(entry.name)
        info["shard_lengths"].append(entry.num_samples)
    return splits, {entry.name: entry.num_samples for entry in manifest.shards}


def _replace_file(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}.") from error
