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


class Window(io.RawIOBase):
    """A read-only view of `size` bytes of an open file, so that tarfile can walk an archive inside an archive."""

    def __init__(self, descriptor: int, *, offset: int, size: int) -> None:
        self._descriptor, self._offset, self._size, self._position = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._descriptor, wanted, self._offset + self._position)
        self._position += len(data)
        return data


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
            return list(_walk(Window(file.fileno(), offset=offset, size=size), offset, size, called))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error


def _walk(window: Window, offset: int, size: int, called: str) -> Iterator[Member]:
    _refuse_compressed(window, called)
    try:
        with tarfile.open(fileobj=window, mode="r:") as archive:
            for info in archive:
                if info.size < 0:  # older versions of tarfile would walk backwards, for ever
                    raise InputError(f"{called} is damaged: its member {info.name} claims {info.size} bytes.")
                if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    continue
                if info.offset_data + info.size > size:
                    raise InputError(f"{called} ends in the middle of its member {info.name}: is it a whole download?")
                yield Member(info.name, offset + info.offset_data, info.size)
            # tarfile takes a damaged header, or the end of a cut file, for the end of the archive
            window.seek(archive.offset)
            if window.read(HEADER_BYTES) != bytes(HEADER_BYTES):
                raise InputError(f"{called} is damaged or cut short at byte {archive.offset}: is it a whole download?")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{called} is not a whole tar archive ({error}).") from error


def _refuse_compressed(window: Window, called: str) -> None:
    magic = window.read(6)
    window.seek(0)
    for start, kind in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"PK\x03\x04", "zip")):
        if magic.startswith(start):
            raise InputError(f"{called} is compressed ({kind}) and cannot be read by offset: uncompress it first.")


@dataclass(frozen=True)
class InnerArchive:
    """An archive inside an archive, to be listed."""

    path: Path
    member: Member


def list_inner(archive: InnerArchive) -> tuple[str, Listing]:
    """Return the name of one inner archive and its images, compact enough to be sent between processes.

    Raises:
        InputError: as list_members.
    """
    member = archive.member
    images = list_members(
        archive.path, offset=member.offset, size=member.size, called=f"{member.name} in {archive.path}"
    )
    return member.name, Listing(
        names=[os.fsencode(image.name) for image in images],
        sizes=np.array([image.size for image in images], dtype=np.int64),
        offsets=np.array([image.offset for image in images], dtype=np.int64),
    )
