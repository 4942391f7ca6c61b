"""What every source of images is turned into: class names, and the images of each split in a few flat arrays.

A full ImageNet has 1.28 million training images: about 90 bytes for each, where one Python object for each of its
strings would cost ten times that.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.errors import InputError, UndecodableError

NO_LABEL = -1
MAX_KEY_LENGTH = 80  # a USTAR header holds 100 characters, extension included


class Source(Protocol):
    """Where the bytes of one image come from."""

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class ByteRange:
    """Bytes `offset` to `offset + size` of a file: an archive's member, or a whole file (offset 0)."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the bytes without moving through the file.

        Raises:
            InputError: the file cannot be read, or has shrunk since it was listed.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                data = os.pread(descriptor, self.size, self.offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}.") from error
        if len(data) != self.size:
            raise InputError(
                f"{self.path} changed while it was read: {self.size} bytes were expected at offset {self.offset}, "
                f"{len(data)} came."
            )
        return data


# What is wrong with one file, not with the disk or the network behind it.
_OF_ONE_FILE = frozenset({errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.EISDIR})


@dataclass(frozen=True)
class ImageFile(ByteRange):
    """A file that is one image: if it cannot be read, that image is left out."""

    def read(self) -> bytes:
        """Read the file.

        Raises:
            UndecodableError: it may not be read, or is gone.
            InputError: as `ByteRange`.
        """
        try:
            return super().read()
        except InputError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _OF_ONE_FILE:
                raise UndecodableError(str(error).rstrip(".")) from error
            raise


@dataclass(frozen=True)
class Record:
    """One image on its way into a shard; `label` may be NO_LABEL."""

    key: str
    filename: str
    label: int
    source: Source


class Catalogue(Protocol):
    """The images of one split in their canonical order, before the shuffle."""

    def __len__(self) -> int: ...

    def records(self, positions: Iterable[int]) -> list[Record]: ...

    def fingerprint(self) -> str: ...

    def total_bytes(self) -> int: ...


@dataclass(frozen=True)
class ImageSet:
    """A data set to be packed: class names in label order, a catalogue per split, and what the user should know.

    `splits` has the keys "train", "validation" or both; `notes` are sentences on what was found in the source,
    and `drawn` says that the images are made here, so that their bytes depend on the encoder.
    """

    classes: Sequence[str]
    splits: Mapping[str, Catalogue]
    notes: Sequence[str] = ()
    drawn: bool = False


def choose_classes(classes: Sequence[str], limit: int | None) -> list[str]:
    """The first `limit` classes; all without a limit.

    Raises:
        InputError: there are not so many.
    """
    if limit is not None and not 1 <= limit <= len(classes):
        raise InputError(f"--limit-classes must be between 1 and {len(classes)}, the number of classes, not {limit}.")
    return list(classes[:limit])


class TextColumn:
    """Many short strings in one bytes object, with the end of each."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._blob = b"".join(texts)
        self._ends = np.cumsum([len(text) for text in texts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, position: int) -> str:
        start = int(self._ends[position - 1]) if position else 0
        return os.fsdecode(self._blob[start : int(self._ends[position])])


@dataclass(frozen=True)
class Listing:
    """Images as one folder or archive lists them: parallel sequences, in any order.

    `names` are member names (archive) or paths below the root (folder), `offsets` is None for a folder.
    """

    names: Sequence[bytes]
    sizes: Sequence[int] | np.ndarray
    offsets: Sequence[int] | np.ndarray | None

    def take(self, positions: Sequence[int]) -> Listing:
        """The images at these positions, with their sizes and offsets as int64 arrays."""
        offsets = None if self.offsets is None else np.asarray(self.offsets, dtype=np.int64)[positions]
        names = [self.names[position] for position in positions]
        return Listing(names, np.asarray(self.sizes, dtype=np.int64)[positions], offsets)


class FileCatalogue:
    """A catalogue whose images lie in one archive or below one folder, sorted by key.

    Sorting makes the result independent of how the source lists its images, so an archive and the folder extracted
    from it give the same shards.
    """

    def __init__(
        self, listing: Listing, *, root: Path, keys: Sequence[bytes], labels: Sequence[int], keep_folders: bool
    ) -> None:
        """Sort the listing by key.

        Args:
            root: the archive, or the folder that the names are relative to.
            keys: one per image, unique.
            keep_folders: a sample's `filename` keeps its class folder; otherwise it is the bare file name.

        Raises:
            InputError: two images have the same key.
        """
        order = sorted(range(len(keys)), key=keys.__getitem__)
        for first, second in itertools.pairwise(order):
            if keys[first] == keys[second]:
                raise InputError(f"{root} holds two images with the key {os.fsdecode(keys[first])}.")
        self._root = str(root)
        self._keep_folders = keep_folders
        self._keys = TextColumn([keys[i] for i in order])
        self._labels = np.asarray(labels, dtype=np.int32)[order]
        in_order = listing.take(order)
        self._names, self._offsets = TextColumn(in_order.names), in_order.offsets
        self._sizes = np.asarray(in_order.sizes)

    def __len__(self) -> int:
        return len(self._keys)

    def records(self, positions: Iterable[int]) -> list[Record]:
        """The images at these positions of the canonical order."""
        return [self._record(int(position)) for position in positions]

    def _record(self, position: int) -> Record:
        name, size = self._names[position], int(self._sizes[position])
        source: ByteRange
        if self._offsets is None:
            source = ImageFile(os.path.join(self._root, name), 0, size)
        else:
            source = ByteRange(self._root, int(self._offsets[position]), size)
        filename = name if self._keep_folders else name.rpartition("/")[2]
        return Record(self._keys[position], filename, int(self._labels[position]), source)

    def fingerprint(self) -> str:
        """SHA-256 over keys, sizes and labels: equal for the same images wherever they lie."""
        digest = hashlib.sha256()
        for position in range(len(self)):
            line = f"{self._keys[position]} {self._sizes[position]} {self._labels[position]}\n"
            digest.update(os.fsencode(line))
        return digest.hexdigest()

    def total_bytes(self) -> int:
        """Size of all images as they lie in the source."""
        return int(self._sizes.sum())


def clean_key(text: str) -> bytes:
    """A key that is safe in every reader: letters, digits, `_` and `-`, at most 80 of them.

    WebDataset ends a key at the first dot and skips names that open with two underscores.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", text).lstrip("_") or "image"
    if len(key) > MAX_KEY_LENGTH:
        digest = hashlib.sha256(os.fsencode(text)).hexdigest()[:12]
        key = f"{key[: MAX_KEY_LENGTH - 13]}_{digest}"
    return key.encode("ascii")


def number_repeated(keys: Sequence[bytes]) -> list[bytes]:
    """Make keys unique: the second `a` becomes `a-2`, in the order given."""
    taken = set(keys)
    seen: dict[bytes, int] = {}
    unique = []
    for key in keys:
        count = seen.get(key, 0) + 1
        candidate = key
        if count > 1:
            while (candidate := b"%s-%d" % (key, count)) in taken:
                count += 1
            taken.add(candidate)
        seen[key] = count
        unique.append(candidate)
    return unique
