"""Tar archives as lists of byte ranges: headers are read once, nothing is extracted.

Member names are only ever text here: they name classes and samples and never reach the file system.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.catalogue import Listing
from data_prep.errors import InputError

HEADER_BYTES = 512


@dataclass(frozen=True)
class Member:
    """A regular file inside an archive; `offset` counts from the start of the outermost file."""

    name: str
    offset: int
    size: int


def list_members(path: Path, *, offset: int = 0, size: int | None = None, called: str | None = None) -> list[Member]:
    """The regular files of the tar archive at `offset` of `path` (all of the file by default), in archive order.

    Raises:
        InputError: no such file, no tar archive, compressed, or cut short.
    """
    called = called or str(path)
    try:
        with open(path, "rb", buffering=0) as file:
            if size is None:
                size = os.fstat(file.fileno()).st_size - offset
            file.seek(offset)
            return list(_walk(file, offset + size, called))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error


def _walk(file: io.FileIO, end: int, called: str) -> Iterator[Member]:
    """Read the headers of the archive that begins at the file's position and reaches to `end`."""
    start = file.tell()
    _refuse_compressed(file, called)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.size < 0:  # older versions of tarfile would walk backwards, for ever
                    raise InputError(f"{called} is damaged: its member {info.name} claims {info.size} bytes.")
                if info.offset >= end:
                    break  # a member of the archive around this one
                if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue
                if info.offset_data + info.size > end:
                    raise InputError(f"{called} ends in the middle of its member {info.name}: is it a whole download?")
                yield Member(info.name, info.offset_data, info.size)
            # tarfile takes a damaged header, or the end of a cut file, for the end of the archive
            last = os.pread(file.fileno(), HEADER_BYTES, archive.offset)
            if last != bytes(HEADER_BYTES) or archive.offset + HEADER_BYTES > end:
                where = min(archive.offset, end) - start
                raise InputError(f"{called} is damaged or cut short at byte {where}: is it a whole download?")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{called} is not a whole tar archive ({error}).") from error


def _refuse_compressed(file: io.FileIO, called: str) -> None:
    magic = os.pread(file.fileno(), 6, file.tell())
    for start, kind in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"PK\x03\x04", "zip")):
        if magic.startswith(start):
            raise InputError(f"{called} is compressed ({kind}) and cannot be read by offset: uncompress it first.")


def list_inner(member: Member, *, path: Path) -> tuple[str, Listing]:
    """Return the name of one archive inside that at `path`, and its images, compact enough to be sent to a process.

    Raises:
        InputError: as list_members.
    """
    images = list_members(path, offset=member.offset, size=member.size, called=f"{member.name} in {path}")
    return member.name, Listing(
        names=[os.fsencode(image.name) for image in images],
        sizes=np.array([image.size for image in images], dtype=np.int64),
        offsets=np.array([image.offset for image in images], dtype=np.int64),
    )
