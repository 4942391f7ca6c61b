"""Writing one shard, so that it exists whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.catalogue import NO_LABEL, ByteRange, Record
from data_prep.errors import OutputError, UndecodableError
from data_prep.images import StoredImage, check_file_size, prepare_image
from data_prep.shards import PARTIAL_SUFFIX, ShardEntry, file_sha256, sync_folder

PRELOADED = ("data_prep.writer", "webdataset.writer")  # what the workers of a packing run share


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs to write one shard; `finished` describes the one that is there already, if any."""

    folder: Path
    name: str
    split: str
    records: list[Record]
    resize_shorter: int | None
    quality: int
    finished: ShardEntry | None = None


class ShardFile(FileIO):
    """A file that counts and hashes what is written to it.

    After a failed write it swallows the rest: tarfile writes once more while it is closed, and the first error is
    the one to report.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`; an error is kept for finish() to raise."""
        left = memoryview(data)
        if self.error is None:
            self._digest.update(left)
            self.num_bytes += len(left)
            try:
                while left:
                    left = left[super().write(left) :]
            except OSError as error:
                self.error = error
        return len(data)

    def finish(self) -> str:
        """Force the bytes to the disk and return their SHA-256.

        Raises:
            OSError: any write failed.
        """
        if self.error is not None:
            raise self.error
        os.fsync(self.fileno())
        return self._digest.hexdigest()


def finish_shard(task: ShardTask) -> ShardEntry:
    """Write the shard, or keep the one that is there if it has the expected checksum.

    Raises:
        OutputError: the shard cannot be written (no half shard is left under its name).
        InputError: an image cannot be read (one that is read but does not decode is left out and recorded).
    """
    path = task.folder / task.name
    if task.finished is not None and file_sha256(path) == task.finished.sha256:
        return replace(task.finished, kept=True)
    partial = task.folder / f".{task.name}.{os.getpid()}{PARTIAL_SUFFIX}"
    try:
        entry = _write_partial(task, partial)
        os.replace(partial, path)
        sync_folder(task.folder)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; the finished shards are whole, and the same command goes on from "
            "there."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return entry


def _write_partial(task: ShardTask, partial: Path) -> ShardEntry:
    from webdataset.writer import TarWriter  # imports torch: seconds and 500 MB that only writing processes pay

    skipped: list[dict[str, str]] = []
    num_samples = num_disguised = num_reencoded = 0
    with ShardFile(partial) as file:
        with TarWriter(file, encoder=False, mtime=0) as writer:
            for record, image in _prepare_images(task, skipped):
                writer.write(_sample(record, image))
                num_samples += 1
                num_reencoded += image.reencoded
                num_disguised += not image.reencoded and _is_disguised(record.filename, image.extension)
                if file.error is not None:
                    break
        sha256 = file.finish()
    return ShardEntry(
        task.name,
        task.split,
        sha256=sha256,
        num_bytes=file.num_bytes,
        num_samples=num_samples,
        num_disguised=num_disguised,
        num_reencoded=num_reencoded,
        skipped=skipped,
    )


def _prepare_images(task: ShardTask, skipped: list[dict[str, str]]) -> Iterator[tuple[Record, StoredImage]]:
    for record in task.records:
        try:
            if isinstance(record.source, ByteRange):
                check_file_size(record.source.size)
            image = prepare_image(record.source.read(), resize_shorter=task.resize_shorter, quality=task.quality)
        except UndecodableError as error:
            skipped.append({"split": task.split, "key": record.key, "filename": record.filename, "reason": str(error)})
            continue
        yield record, image


def _is_disguised(filename: str, extension: str) -> bool:
    suffix = PurePosixPath(filename).suffix.lower().replace("jpeg", "jpg")
    return suffix != f".{extension}"


def _sample(record: Record, image: StoredImage) -> dict[str, Any]:
    facts = {"filename": record.filename, "label": record.label, "height": image.height, "width": image.width}
    if record.label == NO_LABEL:
        del facts["label"]
    label = {} if record.label == NO_LABEL else {"cls": str(record.label).encode("ascii")}
    return {
        "__key__": record.key,
        image.extension: image.data,
        **label,
        "json": json.dumps(facts).encode("ascii"),
    }
