"""Tar files of samples: which there are, how many samples each holds, and where in the file each sample lies.

A sample is a run of neighbouring members with one key: KEY.jpg (or jpeg, png, webp), KEY.cls with an ASCII integer,
and anything else, which is ignored. Tar headers are read once per shard; afterwards a sample costs one read at a known
offset. Members are read by offset alone: nothing is unpickled, executed or written, and no member's name is ever used
as a path.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vitfreeze.data.addresses import Address, Kind, cut_query, expand_names, is_remote, read_address
from vitfreeze.data.downloads import DownloadCache
from vitfreeze.data.errors import BadSampleError, ShardError
from vitfreeze.files import parse_json, replacing, suggest_path

_log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_EXTENSION = "cls"
_BLOCK = 512
# What tarfile raises for headers that are none, beside its own errors: int(), struct and slices meet any bytes there.
_BAD_HEADER = (tarfile.TarError, ValueError, LookupError, TypeError, OverflowError, OSError, RecursionError)
_LARGEST_HEADER = 1 << 20  # bytes; those of PAX hold names and comments
_MOST_SAMPLES = 100_000_000  # in one shard
_CHUNK = 1 << 20
_LONGEST_PADDING = 1 << 20  # bytes of zeros at the end; tar pads to its record, of 10 KiB by default
_INDEX_VERSION = 3
_INDEX_ARRAYS = ("offsets", "sizes", "labels")
_LONGEST_LABEL = 32  # bytes; a class index needs fewer


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where the samples of one shard lie.

    Attributes:
        keys: the samples' keys.
        offsets: (n,) int64, first byte of each image in the shard.
        sizes: (n,) int64, bytes of each image.
        labels: (n,) int64 class index; -1 where the shard names none.
        defects: why a sample cannot be used, by its place in the shard.
        flaw: how the archive ends otherwise than tar archives do, with zeros and nothing behind them; empty if it ends
            well.
    """

    keys: Sequence[str]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    defects: Mapping[int, str]
    flaw: str

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class _Draft:
    """One sample while its members are met."""

    key: str
    images: list[tuple[int, int]] = field(default_factory=list)
    labels: list[bytes] = field(default_factory=list)
    dotted: str = ""  # a member that would be an image, had its name one dot only


def index_shard(file: BinaryIO, *, name: str) -> ShardIndex:
    """Read the headers of a tar file.

    Args:
        file: the shard, opened for reading in binary.
        name: how to call it in messages.

    Raises:
        ShardError: it is not an uncompressed tar file.
    """
    drafts: list[_Draft] = []
    size = os.fstat(file.fileno()).st_size
    try:
        archive = tarfile.open(fileobj=_Headers(file, name), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
    except _BAD_HEADER as error:
        raise (
            error if isinstance(error, ShardError) else ShardError(_describe_foreign_file(file, name, size))
        ) from error
    reached = -1
    try:
        for member in archive:
            if archive.offset <= reached:  # a negative size leads back to members that were read
                break
            reached = archive.offset
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                continue
            key, extension = split_member_name(member.name)
            if not drafts or drafts[-1].key != key:
                drafts.append(_Draft(key))
            if extension in IMAGE_EXTENSIONS:
                drafts[-1].images.append((member.offset_data, member.size))
            elif extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                drafts[-1].dotted = member.name
            elif extension == LABEL_EXTENSION:
                drafts[-1].labels.append(os.pread(file.fileno(), min(member.size, _LONGEST_LABEL), member.offset_data))
    except ShardError:
        raise
    except _BAD_HEADER:
        pass  # cut in the middle: tarfile says so for some cuts and is silent for others, so the end is looked at
    return _build_index(drafts, file_size=size, flaw=_find_flaw(file, min(max(archive.offset, 0), size)))


class _Headers:
    """A shard as tarfile sees it: the headers, each of a size that headers have. Bodies are passed over by seeking."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name, self._taken, self._reached = file, name, 0, -1
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        start = self._file.tell()
        self._taken = self._taken + size if start == self._reached else size
        if not 0 <= size <= self._taken <= _LARGEST_HEADER:
            raise ShardError(f"shard {self._name} has a header of {size:,} bytes at byte {start:,}; it is damaged")
        data = self._file.read(size)
        self._reached = start + len(data)
        return data


def _find_flaw(file: BinaryIO, end: int) -> str:
    """Say what is wrong with what stands where the headers end: zeros up to the end of the file are right."""
    start = end
    while chunk := os.pread(file.fileno(), _CHUNK, end):
        if chunk.strip(b"\0"):
            return (
                "goes on behind tar's mark of an end: its middle was overwritten with zeros, or two archives were put "
                "together"
                if end > start or not any(chunk[:_BLOCK])
                else "breaks off without tar's mark of an end"
            )
        end += len(chunk)
    if end - start < _BLOCK:
        return "breaks off without tar's mark of an end"
    if end - start > _LONGEST_PADDING:
        return f"ends in {end - start:,} bytes of zeros, which no tar program writes: its last part was never filled"
    return ""


def split_member_name(name: str) -> tuple[str, str]:
    """Return (key, lower-case extension); as in WebDataset, the first dot of the last path component parts them."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _build_index(drafts: Sequence[_Draft], *, file_size: int, flaw: str) -> ShardIndex:
    offsets, sizes = np.full(len(drafts), -1, np.int64), np.zeros(len(drafts), np.int64)
    labels, defects = np.full(len(drafts), -1, np.int64), {}
    seen: set[str] = set()
    for place, draft in enumerate(drafts):
        defect = _find_defect(draft, seen, file_size)
        seen.add(draft.key)
        if defect:
            defects[place] = defect
            continue
        offsets[place], sizes[place] = draft.images[0]
        if draft.labels:
            labels[place] = int(draft.labels[0])
    keys = [draft.key for draft in drafts]
    return ShardIndex(keys=keys, offsets=offsets, sizes=sizes, labels=labels, defects=defects, flaw=flaw)


def _find_defect(draft: _Draft, seen: set[str], file_size: int) -> str:
    if draft.key in seen:
        return "its key occurs twice in the shard"
    if not draft.images:
        if draft.dotted:
            return f"its image {draft.dotted} has a dot before the extension, where WebDataset ends a key"
        return "it has no image"
    if len(draft.images) > 1:
        return f"it has {len(draft.images)} images"
    if len(draft.labels) > 1:
        return f"it has {len(draft.labels)} labels"
    if min(draft.images[0]) < 0:
        return f"its header says that it has {draft.images[0][1]} bytes"
    if sum(draft.images[0]) > file_size:
        return "the shard ends in the middle of it"
    if draft.labels and not (draft.labels[0].strip().isdigit() and int(draft.labels[0]) < 2**31):
        return f"its label {draft.labels[0]!r} is not a class index"
    return ""


def _describe_foreign_file(file: BinaryIO, name: str, size: int) -> str:
    head = os.pread(file.fileno(), 64, 0)
    if not size:
        return f"shard {name} is empty; fetch it again"
    if head[:2] == b"\x1f\x8b":
        return f"shard {name} is compressed by gzip, which cannot be read by offset; decompress it"
    if head.lstrip()[:1] == b"<":
        return (
            f"shard {name} is a web page ({head[:40].decode('latin-1').strip()!r}...), not a tar file; fetch it again"
        )
    return f"shard {name} is not a tar file (it begins with {head[:16]!r}); fetch it again"


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """The shards of one split.

    Attributes:
        names: path or URL of each shard.
        lengths: samples that each shard is said to hold; None where only its headers can tell.
    """

    names: tuple[str, ...]
    lengths: tuple[int | None, ...]


def find_shards(source: str | os.PathLike[str] | Sequence[str], *, split: str, allow_pipe: bool = False) -> ShardSet:
    """List the shards that a source names.

    Args:
        source: a folder or the URL of one (ends in '/'), a path or URL with or without braces, or a list of such; '~'
            is the user's home. What `_info.json` or `sizes.json` beside the shards says of their lengths is believed
            until the headers are read.
        split: which split of a folder's `_info.json` is wanted, for example 'train' or 'validation'.
        allow_pipe: whether the user's command line allows 'pipe:COMMAND', which runs a shell command and reads its
            output.

    Raises:
        ShardError: nothing is there, a shard is named twice, or a name is one that `read_address` refuses.
    """
    sources = [os.fspath(source)] if isinstance(source, str | os.PathLike) else [os.fspath(item) for item in source]
    names: list[str] = []
    for item in expand_names(sources):
        name = read_address(item, allow_pipe=allow_pipe).name
        is_folder = name.endswith("/") or (os.path.isdir(name) and not is_remote(name))
        names += _list_folder(name, split) if is_folder else [name]
    if not names:
        raise ShardError(
            f"no shard is named by {source!r}; give a folder, a pattern such as DIR/train-{{0000..0031}}.tar"
        )
    # What a folder lists is a stranger's word, too.
    addresses = [read_address(name, allow_pipe=allow_pipe) for name in names]
    _check_addresses(addresses)
    lengths = _read_lengths([address.name for address in addresses if address.kind is not Kind.COMMAND])
    names = [address.name for address in addresses]
    return ShardSet(names=tuple(names), lengths=tuple(lengths.get(name) for name in names))


def _check_addresses(addresses: Sequence[Address]) -> None:
    twice = next((address for address, count in Counter(addresses).items() if count > 1), None)
    if twice:
        raise ShardError(f"shard {cut_query(twice.name)} is listed twice, so an epoch would show its samples twice")
    for path in (address.target for address in addresses if address.kind is Kind.FILE):
        if not os.path.isfile(path):
            raise ShardError(f"shard {path} does not exist{_describe_start(path)}{suggest_path(Path(path))}")
    if commands := [address.target for address in addresses if address.kind is Kind.COMMAND]:
        _log.info(
            "%d of %d shards are read from shell commands, which this command line allows and every later one must "
            "allow again, also to go on with the run; the first: %r", len(commands), len(addresses), commands[0],
        )  # fmt: skip


def _describe_start(path: str) -> str:
    """Return, for a relative path, the folder it is sought from."""
    return "" if os.path.isabs(path) else f"; it was sought from {os.getcwd()}"


def _list_folder(folder: str, split: str) -> list[str]:
    splits = _read_splits(folder)
    base = folder if folder.endswith("/") else folder + "/"
    if splits is not None:
        if split not in splits:
            raise ShardError(f"{base}_info.json describes the splits {sorted(splits)}, not {split!r}")
        return [base + name for name, _ in splits[split]]
    if is_remote(folder):
        raise ShardError(f"{cut_query(base)} has no _info.json to list its shards; give a brace pattern of their URLs")
    if not os.path.isdir(folder):
        raise ShardError(f"folder {folder} does not exist{_describe_start(folder)}{suggest_path(Path(folder))}")
    files = sorted(path.name for path in Path(folder).glob("*.tar") if path.is_file())
    if not files:
        raise ShardError(f"folder {folder} holds no *.tar file")
    kinds = sorted({Path(name).stem.rstrip("0123456789").rstrip("-_") for name in files})
    if len(kinds) > 1:
        raise ShardError(
            f"folder {folder} holds several sets of shards ({', '.join(kinds[:4])}) and no _info.json to tell them "
            f"apart; give a pattern such as {base}{kinds[0]}-{{...}}.tar"
        )
    return [base + name for name in files]  # as it was given: without its './', a path may look like a command


def _read_splits(folder: str) -> dict[str, list[tuple[str, int]]] | None:
    """Return the shards of every split that a folder's `_info.json` lists, with their lengths; None if it has none.

    Raises:
        ShardError: it does not say what timm's and data_prep's say.
    """
    info = _read_json(folder, "_info.json")
    if info is None:
        return None
    try:
        splits = {
            split: list(zip(part["filenames"], map(int, part["shard_lengths"]), strict=True))
            for split, part in info["splits"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise ShardError(
            f"{cut_query(folder).rstrip('/')}/_info.json must hold splits with as many filenames as shard_lengths each"
        ) from None
    for name, length in (pair for files in splits.values() for pair in files):
        _check_length(length, f"{cut_query(folder).rstrip('/')}/_info.json")
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            raise ShardError(
                f"{folder.rstrip('/')}/_info.json lists {name!r}, which is not the name of a file beside it"
            )
    return splits


def _read_lengths(names: Sequence[str]) -> dict[str, int]:
    """Return the lengths that files beside the shards state."""
    lengths: dict[str, int] = {}
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in names):
        base = folder + "/" if folder else ""
        splits = _read_splits(base or ".")
        for files in (splits or {}).values():
            lengths |= {base + name: length for name, length in files}
        if splits is None:
            lengths |= _read_sizes(base)
    return lengths


def _read_sizes(base: str) -> dict[str, int]:
    sizes = _read_json(base or ".", "sizes.json") or {}
    try:
        lengths = {base + name: int(length) for name, length in sizes.items()}
    except (TypeError, ValueError, OverflowError):
        raise ShardError(f"{cut_query(base)}sizes.json must hold a number of samples for each shard") from None
    for length in lengths.values():
        _check_length(length, f"{cut_query(base)}sizes.json")
    return lengths


def _check_length(length: int, source: str) -> None:
    if not 0 <= length <= _MOST_SAMPLES:
        raise ShardError(f"{source} says that a shard holds {length:,} samples; allowed: 0 to {_MOST_SAMPLES:,}")


def _read_json(folder: str, file_name: str) -> dict | None:
    """Read a JSON object beside the shards; None when there is none."""
    if is_remote(folder):
        text = DownloadCache.read_small(folder.rstrip("/") + "/" + file_name)
    else:
        path = Path(folder) / file_name
        try:
            text = path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise ShardError(f"{path} cannot be read ({error.strerror})") from error
    if text is None:
        return None
    try:
        value = parse_json(text, name=f"{cut_query(folder)}/{file_name}")
    except ValueError as error:
        raise ShardError(str(error)) from error
    if not isinstance(value, dict):
        raise ShardError(f"{cut_query(folder)}/{file_name} must hold a JSON object")
    return value


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample: its key, label (-1: none) and where its image lies."""

    key: str
    label: int
    offset: int
    size: int


class ShardReader:
    """Reads samples of a ShardSet by (shard, place). Each process has its own; what it holds open is bounded.

    Args:
        shards: what to read.
        downloads: cache for remote shards.
        index_dir: folder where the headers, once read, are kept between runs.
        num_classes: labels must be smaller; None accepts any.
        open_shards: how many shards are kept open and their indices in memory.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        downloads: DownloadCache,
        index_dir: Path,
        num_classes: int | None = None,
        open_shards: int = 48,
    ) -> None:
        self.shards = shards
        self.downloads = downloads
        self.index_dir = index_dir
        self.num_classes = num_classes
        self.open_shards = open_shards
        self._open: OrderedDict[int, tuple[BinaryIO, ShardIndex]] = OrderedDict()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}

    def close(self) -> None:
        """Close every shard."""
        while self._open:
            self._open.popitem()[1][0].close()

    def length(self, shard: int) -> int:
        """Return the number of samples of a shard, from its headers where nothing states it.

        Raises:
            ShardError: nothing states it, and the shard does not end as it should, so nobody can say what was lost.
        """
        stated = self.shards.lengths[shard]
        if stated is not None:
            return stated
        index = self._enter(shard)[1]
        if index.flaw:
            raise ShardError(
                f"shard {cut_query(self.shards.names[shard])} holds {len(index)} samples and then {index.flaw}; no "
                "_info.json says how many it should hold, so fetch it again"
            )
        return len(index)

    def sample(self, shard: int, place: int) -> Sample:
        """Find a sample.

        Raises:
            BadSampleError: it is unusable.
            ShardError: the shard is.
        """
        index = self._enter(shard)[1]
        if place >= len(index):
            raise BadSampleError(f"the shard holds {len(index)} samples where {self.length(shard)} are announced")
        if place in index.defects:
            raise BadSampleError(index.defects[place])
        label = int(index.labels[place])
        if self._is_bad_label(label):
            raise BadSampleError(self._describe_label(label))
        return Sample(
            key=index.keys[place], label=label, offset=int(index.offsets[place]), size=int(index.sizes[place])
        )

    def check_labels(self, shard: int, *, max_bad_fraction: float) -> None:
        """Look at the labels of a shard before anything else is done: a wrong number of classes spoils many at once.

        Raises:
            ShardError: more than one sample, and more than `max_bad_fraction` of them, has none or one too large.
        """
        index = self._enter(shard)[1]
        labels = [(place, int(label)) for place, label in enumerate(index.labels) if place not in index.defects]
        bad = [(place, label) for place, label in labels if self._is_bad_label(label)]
        if len(bad) > max(1, max_bad_fraction * len(labels)):
            place, label = bad[0]
            raise ShardError(
                f"shard {cut_query(self.shards.names[shard])} does not go with {self.num_classes} classes "
                f"(finetune.num_classes): {len(bad)} of its {len(labels)} labels cannot be used, as that of "
                f"{index.keys[place]}: {self._describe_label(label)}"
            )

    def samples_of(self, shard: int) -> list[tuple[str, int]]:
        """Return key and label of every sample of a shard, usable or not; of those that are missing, '' and -1."""
        index = self._enter(shard)[1]
        missing = self.length(shard) - len(index)
        return [*zip(index.keys, index.labels.tolist(), strict=True), *[("", -1)] * missing]

    def has_labels(self, shard: int) -> bool:
        """Say whether any sample of a shard has a label."""
        return bool((self._enter(shard)[1].labels >= 0).any())

    def _is_bad_label(self, label: int) -> bool:
        return self.num_classes is not None and not 0 <= label < self.num_classes

    def _describe_label(self, label: int) -> str:
        return "it has no label" if label < 0 else f"its label {label} is not below {self.num_classes}"

    def key(self, shard: int, place: int) -> str:
        """Return a sample's key, or its place where it has none."""
        index = self._enter(shard)[1]
        return index.keys[place] if place < len(index) else f"#{place}"

    def read(self, shard: int, sample: Sample) -> bytes:
        """Read the bytes of a sample's image.

        Raises:
            BadSampleError: the file ends before the image does.
        """
        file = self._enter(shard)[0]
        data = os.pread(file.fileno(), sample.size, sample.offset)
        if len(data) < sample.size:
            raise BadSampleError(f"the shard ends {sample.size - len(data)} bytes before the image does")
        return data

    def expect(self, shard: int, sample: Sample) -> None:
        """Tell the system that a sample will soon be read, so that reading and decoding overlap."""
        file = self._enter(shard)[0]
        if hasattr(os, "posix_fadvise"):  # Linux; macOS has none
            os.posix_fadvise(file.fileno(), sample.offset, sample.size, os.POSIX_FADV_WILLNEED)

    def _enter(self, shard: int) -> tuple[BinaryIO, ShardIndex]:
        known = self._open.get(shard)
        if known is not None:
            self._open.move_to_end(shard)
            return known
        name = self.shards.names[shard]
        file = self._open_file(name)
        try:
            index = self._load_index(file, name)
            stated = self.shards.lengths[shard]
            if stated is not None and len(index) > stated:
                raise ShardError(
                    f"shard {cut_query(name)} holds {len(index)} samples, but the file that lists the shards' lengths "
                    f"says {stated}; one of the two is out of date"
                )
        except BaseException:
            file.close()
            raise
        self._open[shard] = file, index
        while len(self._open) > self.open_shards:
            self._open.popitem(last=False)[1][0].close()
        return file, index

    def _open_file(self, name: str) -> BinaryIO:
        if is_remote(name):
            return self.downloads.open(name)
        try:
            return open(name, "rb")
        except OSError as error:
            raise ShardError(f"shard {name} cannot be opened ({error.strerror}); it was there at the start") from error

    def _load_index(self, file: BinaryIO, name: str) -> ShardIndex:
        """Take the index from the cache, or read the headers and put it there."""
        stat = os.fstat(file.fileno())
        identity = [_INDEX_VERSION, name if is_remote(name) else os.path.abspath(name), stat.st_size]
        if not is_remote(name):
            identity.append(stat.st_mtime_ns)
        path = self.index_dir / (hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:40] + ".npz")
        index = _read_index(path)
        if index is None:
            try:
                index = index_shard(file, name=cut_query(name))
            except ShardError:
                if is_remote(name):
                    self.downloads.forget(name)
                raise
            _write_index(index, path)
        return index


def check_same_samples(other: ShardReader, main: ShardReader, *, shards: Iterable[int]) -> None:
    """Make sure that shards hold the samples of others, in the same order: keys and labels of all, in all `shards`.

    Raises:
        ShardError: they do not, or they would have to be fetched to know.
    """
    theirs, ours = (cut_query(reader.shards.names[0]) for reader in (other, main))
    if any(is_remote(name) for reader in (other, main) for name in reader.shards.names):
        raise ShardError(
            f"data.train in stages compares all samples before the run, so {theirs} and {ours} must be files here"
        )
    counts = [[reader.length(shard) for shard in range(len(reader.shards.names))] for reader in (other, main)]
    if counts[0] != counts[1]:
        raise ShardError(
            f"data.train in stages needs the same samples in the same order, and the shards from {theirs} on hold "
            f"{sum(counts[0])} in {len(counts[0])} shards, those from {ours} on {sum(counts[1])} in {len(counts[1])}, "
            "or cut otherwise; pack both with the same --samples-per-shard"
        )
    for shard in shards:
        there, here = other.samples_of(shard), main.samples_of(shard)
        place = next((place for place, pair in enumerate(zip(there, here, strict=True)) if pair[0] != pair[1]), None)
        if place is not None:
            names = [cut_query(reader.shards.names[shard]) for reader in (other, main)]
            raise ShardError(
                f"data.train in stages needs the same samples in the same order, and sample {place} of {names[0]} is "
                f"{there[place][0]} with label {there[place][1]}, of {names[1]} {here[place][0]} with label "
                f"{here[place][1]}"
            )


def _write_index(index: ShardIndex, path: Path) -> None:
    """Store an index; a folder that cannot be written costs time at the next start and nothing else."""
    text = json.dumps({"keys": list(index.keys), "defects": list(index.defects.items()), "flaw": index.flaw})
    arrays = {name: getattr(index, name) for name in _INDEX_ARRAYS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as partial, partial.open("wb") as file:
            np.savez(file, text=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)
    except OSError as error:
        _log.warning("the headers of the shards are read anew at each start: %s cannot be written (%s)", path, error)


def _read_index(path: Path) -> ShardIndex | None:
    """Load a stored index; None when there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["text"].tobytes())
            columns = {name: arrays[name] for name in _INDEX_ARRAYS}
            if {column.shape for column in columns.values()} != {(len(facts["keys"]),)}:
                raise ValueError("its columns are not of one length")
            return ShardIndex(
                **columns,
                keys=facts["keys"],
                defects={int(place): str(reason) for place, reason in facts["defects"]},
                flaw=str(facts["flaw"]),
            )
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib and numpy raise many kinds, and none of them matters
        _log.warning("the stored index %s is damaged (%s); the shard's headers are read again", path, error)
        return None
