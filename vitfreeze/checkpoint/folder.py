"""What a checkpoint looks like on disk, and how the newest whole one is found.

    checkpoints/newest                          name of the newest whole checkpoint, replaced atomically
    checkpoints/step-00001234/manifest.json     sizes and checksums of the other files, all scalars, its own checksum
                             /config.yaml       the resolved configuration, of runs that have one
                             /weights.safetensors        the model as it computes
                             /masters.safetensors        fp32 weights of frozen layers that compute in half precision
                             /rank-00000.safetensors     a rank's slices of master weights and moments, its RNG state
    checkpoints/.saving-step-00001234/          one that is being written
    checkpoints/.deleting-step-00001200/        an old one on its way out
    checkpoints/.damaged-step-00001230/         one that a resuming run passed over; removed after the next save

A folder takes its final name only when everything in it has reached the disk, so what has a final name is whole unless
the disk or somebody damages it later: that is what the checksums find. Nothing here is read by unpickling.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitfreeze.config import Config, load_run_config
from vitfreeze.files import read_json, replace_durably, write_durably

logger = logging.getLogger("vitfreeze")

FOLDER_NAME = "checkpoints"
POINTER = "newest"
MANIFEST = "manifest.json"
CONFIG = "config.yaml"
WEIGHTS = "weights.safetensors"
MASTERS = "masters.safetensors"
SAVING_PREFIX, DELETING_PREFIX, DAMAGED_PREFIX = ".saving-", ".deleting-", ".damaged-"
FORMAT_VERSION = 1
# A step can be saved twice, when a run was taken back to an earlier checkpoint: the later one has a number behind it.
_NAME = re.compile(r"step-\d{8,}(\.\d+)?")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose manifest has been read and whose files have been compared with it.

    Attributes:
        path: its folder.
        step: optimizer steps taken, and so the step to go on with.
        serial: how many checkpoints of the run had been written, this one included.
        world_size: ranks that wrote it.
        frozen_layers: length of the frozen prefix that the optimizer's state belongs to.
        extra: what the training loop asked to keep.
        manifest: everything that the manifest says.
        rejected: damaged checkpoints of the folder that were passed over: (path, reason).
    """

    path: Path
    step: int
    serial: int
    world_size: int
    frozen_layers: int
    extra: Mapping[str, Any]
    manifest: Mapping[str, Any]
    rejected: tuple[tuple[str, str], ...] = ()

    def read_config(self) -> Config:
        """Return the configuration of the run that wrote it.

        Raises:
            ConfigError: it cannot be used.
            CheckpointError: it has none, because `save_engine` wrote it.
        """
        if CONFIG not in self.manifest["files"]:
            raise CheckpointError(f"{self.path} was saved with save_engine and has no configuration of a run")
        return load_run_config(self.path / CONFIG)


def checkpoint_name(step: int, *, parent: Path) -> str:
    """Return a name for a checkpoint of `step` that is not taken in `parent`."""
    name = plain = f"step-{step:08d}"
    number = 1
    while (parent / name).exists():
        number += 1
        name = f"{plain}.{number}"
    return name


def find_checkpoint(path: str | Path) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run folder, or the checkpoint that `path` itself is.

    In a run folder, damaged checkpoints are passed over with a warning for the newest whole one, and None means that
    nothing was saved yet. Every byte is read once, so let one rank do it.

    Raises:
        CheckpointError: `path` is a damaged checkpoint, or a run folder in which every checkpoint is damaged.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() or _NAME.fullmatch(path.name):
        return open_checkpoint(path)
    parent = path / FOLDER_NAME
    readable, rejected = sort_checkpoints(parent)
    for path in readable:
        try:
            found = open_checkpoint(path)
        except CheckpointError as error:
            rejected.append((str(path), str(error)))
            continue
        for _, reason in rejected:
            logger.warning("checkpoint passed over: %s", reason)
        return replace(found, rejected=tuple(rejected))
    if rejected:
        raise CheckpointError(f"every checkpoint in {parent} is damaged: {'; '.join(why for _, why in rejected)}")
    return None


def list_checkpoints(parent: Path) -> list[Path]:
    """Return the checkpoint folders in `parent` whose manifest can be read, what was written last first."""
    return sort_checkpoints(parent)[0]


def sort_checkpoints(parent: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Return the checkpoint folders in `parent`, what was written last first, and those without a usable manifest.

    The pointer is not asked: right after a checkpoint got its name, and if somebody removes the pointer, the
    manifests know better.

    Returns:
        The folders, and (path, reason) of each folder that cannot be put in order.
    """
    serials: dict[Path, int] = {}
    rejected = []
    for path in parent.iterdir() if parent.is_dir() else ():
        if _NAME.fullmatch(path.name):
            try:
                serials[path] = int(read_manifest(path)["serial"])
            except CheckpointError as error:
                rejected.append((str(path), str(error)))
    return sorted(serials, key=lambda path: serials[path], reverse=True), rejected


def set_aside(path: Path) -> None:
    """Take a damaged checkpoint out of the row, so that it does not count as one that is kept."""
    aside = path.with_name(f"{DAMAGED_PREFIX}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def write_pointer(parent: Path, name: str) -> None:
    """Let the pointer name a checkpoint, atomically."""
    replace_durably(parent / POINTER, f"{name}\n".encode())


def open_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint's manifest and, to verify it, compare every file with it.

    Raises:
        CheckpointError: a file is missing or differs from what was written.
    """
    manifest = read_manifest(path)
    if verify:
        for name, facts in manifest["files"].items():
            check_file(path / name, size=facts["bytes"], sha256=facts["sha256"])
    try:
        return Checkpoint(
            path=path,
            step=manifest["step"],
            serial=manifest["serial"],
            world_size=manifest["world_size"],
            frozen_layers=manifest["scalars"]["frozen_layers"],
            extra=manifest["extra"],
            manifest=manifest,
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is no manifest of a checkpoint: it lacks {error}") from None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's manifest.

    Raises:
        CheckpointError: there is none, it is not what was written, or it is of another version.
    """
    file = path / MANIFEST
    try:
        whole = read_json(file)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    try:
        content, digest = whole["content"], whole["sha256"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{file} is no manifest of a checkpoint") from None
    if digest != _digest(content):
        raise CheckpointError(f"{file} is damaged: its checksum does not match")
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise CheckpointError(f"{file} is no manifest of a checkpoint")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{file} is of format {content.get('format_version')}, and this reads {FORMAT_VERSION}")
    for name in content["files"]:
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{file} names a file outside of its folder: {name!r}")
    return content


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest with its own checksum; `content` must be ready for JSON."""
    whole = {"sha256": _digest(content), "content": content}
    write_durably(path / MANIFEST, json.dumps(whole).encode())


def check_file(path: Path, *, size: int, sha256: str) -> None:
    """Compare a file with its size and checksum; raises CheckpointError with the difference."""
    try:
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{path} is damaged: {found} bytes, and {size} were written")
        if hash_file(path) != sha256:
            raise CheckpointError(f"{path} is damaged: its checksum does not match")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
