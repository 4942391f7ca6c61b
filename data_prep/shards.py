"""The shards of a data set: their names, what is known of each, and their samples read back."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import InputError

READ_BYTES = 2**20
PARTIAL_SUFFIX = ".partial"  # of files that are not whole yet
NUMBER_WIDTHS = {"train": 4, "validation": 2}  # as in timm/imagenet-1k-wds


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard.

    `num_disguised` images carry another format than their name says, `num_reencoded` were shrunk or converted, and
    `skipped` names those left out; `kept` says that this run found the shard finished.
    """

    name: str
    split: str
    sha256: str
    num_bytes: int
    num_samples: int
    num_disguised: int = 0
    num_reencoded: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    kept: bool = False

    def to_json(self) -> dict[str, Any]:
        """All but `kept`, which says nothing about the shard."""
        fields = asdict(self)
        del fields["kept"]
        return fields


def shard_names(dataset: str, split: str, count: int) -> list[str]:
    """`imagenet1k-train-0000.tar` and so on; validation shards have two digits; wider where the count needs it."""
    digits = max(NUMBER_WIDTHS[split], len(str(count - 1)))
    return [f"{dataset}-{split}-{number:0{digits}d}.tar" for number in range(count)]


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file, None if there is none.

    Raises:
        InputError: it is there and cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Force a rename in this folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
