"""Checking a folder of shards against its manifest: every checksum, every count, every label, every image."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.archives import Member, list_members
from data_prep.catalogue import ByteRange
from data_prep.errors import InputError, UndecodableError
from data_prep.images import EXTENSIONS, check_file_size, prepare_image
from data_prep.json_text import parse_json
from data_prep.manifest import INFO, MANIFEST, SIZES, Manifest, describe_shards, require_manifest
from data_prep.progress import show_progress
from data_prep.shards import ShardEntry, file_sha256
from data_prep.workers import run_tasks

IMAGE_EXTENSIONS = frozenset(EXTENSIONS.values())
MAX_TEXT_BYTES = 64 * 1024


@dataclass
class ShardFindings:
    """What is wrong with one shard, and its keys, which must be unique in the split."""

    entry: ShardEntry
    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """The outcome for a folder; no problem means that every check has passed."""

    num_shards: int
    num_samples: int
    problems: dict[str, list[str]]


@dataclass(frozen=True)
class StoredSample:
    """The members of one sample: extension -> bytes in the shard."""

    key: str
    members: dict[str, ByteRange]


def verify(folder: Path, *, workers: int) -> Verdict:
    """Check everything that packing promises.

    Raises:
        InputError: there is no manifest to check against.
    """
    manifest = require_manifest(folder)
    problems: dict[str, list[str]] = {}
    if folder_problems := _check_folder(folder, manifest):
        problems[str(folder)] = folder_problems
    seen: dict[str, set[str]] = {}
    check = partial(check_shard, folder=folder, num_classes=len(manifest.classes))
    num_samples = sum(entry.num_samples for entry in manifest.shards)
    with show_progress("verifying", total=num_samples) as advance:
        for findings in run_tasks(check, manifest.shards, workers=workers, preload=[__name__]):
            keys = seen.setdefault(findings.entry.split, set())
            repeated = [key for key, count in Counter(findings.keys).items() if count > 1 or key in keys]
            findings.problems += [f"the key {key} occurs more than once in the split" for key in repeated]
            keys.update(findings.keys)
            if findings.problems:
                problems[findings.entry.name] = findings.problems
            advance(findings.entry.num_samples, findings.entry.num_bytes)
    return Verdict(len(manifest.shards), sum(len(keys) for keys in seen.values()), problems)


def _check_folder(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    listed = {entry.name for entry in manifest.shards}
    unlisted = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    problems += [f"{name} is not in {MANIFEST}" for name in unlisted]
    splits, sizes = describe_shards(manifest)
    for name, wanted in ((INFO, {"name": manifest.settings["dataset"], "splits": splits}), (SIZES, sizes)):
        try:
            agrees = parse_json((folder / name).read_text(encoding="utf-8")) == wanted
        except (OSError, ValueError) as error:
            problems.append(f"{name} cannot be read ({error})")
        else:
            problems += [] if agrees else [f"{name} does not agree with {MANIFEST}"]
    return problems


def check_shard(entry: ShardEntry, *, folder: Path, num_classes: int) -> ShardFindings:
    """Check one shard; what is wrong is returned, not raised."""
    findings = ShardFindings(entry)
    path = folder / entry.name
    try:
        checksum = file_sha256(path)
        if checksum is None:
            findings.problems.append("the file is missing")
            return findings
        if checksum != entry.sha256:
            findings.problems.append("the checksum differs: the file has changed since it was packed")
        for sample in read_samples(path):
            findings.keys.append(sample.key)
            problem = _check_sample(sample, num_classes)
            findings.problems += [f"{sample.key}: {problem}"] if problem else []
    except InputError as error:
        findings.problems.append(str(error))
    if len(findings.keys) != entry.num_samples:
        findings.problems.append(f"it holds {len(findings.keys)} samples, {entry.num_samples} were packed")
    return findings


def read_samples(path: Path) -> Iterator[StoredSample]:
    """The samples of a shard, from its headers: neighbours with the same name before the first dot.

    Raises:
        InputError: the shard cannot be read as a tar archive.
    """
    for key, members in itertools.groupby(list_members(path), key=_key_of):
        ranges = {member.name[len(key) + 1 :]: ByteRange(str(path), member.offset, member.size) for member in members}
        yield StoredSample(key, ranges)


def _key_of(member: Member) -> str:
    return member.name.partition(".")[0]


def _check_sample(sample: StoredSample, num_classes: int) -> str | None:
    images = [extension for extension in sample.members if extension in IMAGE_EXTENSIONS]
    others, words = ({"cls", "json"}, ", cls and json") if num_classes else ({"json"}, " and json")
    if len(images) != 1 or sample.members.keys() != {images[0], *others}:
        return f"it consists of {sorted(sample.members)} where one image{words} belong"
    try:
        label = int(read_text(sample, "cls")) if num_classes else None
        facts = parse_json(read_text(sample, "json"))
        source = sample.members[images[0]]
        check_file_size(source.size)
        image = prepare_image(source.read())
    except UndecodableError as error:
        return f"the image does not decode ({error})"
    except ValueError as error:
        return f"its label or description cannot be read ({error})"
    if label is not None and not 0 <= label < num_classes:
        return f"the label {label} is not between 0 and {num_classes - 1}"
    found: dict[str, Any] = {"label": label, "height": image.height, "width": image.width}
    told = {name: facts.get(name) for name in found} if isinstance(facts, dict) else None
    if told != found:
        return f"its description says {told}, its members say {found}"
    if image.extension != images[0]:
        return f"it is called .{images[0]} and is .{image.extension} by its content"
    return None


def read_text(sample: StoredSample, extension: str) -> str:
    """The text of a small member.

    Raises:
        ValueError: it is missing, too large or no ASCII.
    """
    source = sample.members.get(extension)
    if source is None or source.size > MAX_TEXT_BYTES:
        raise ValueError(f"no .{extension} of a sensible size")
    return source.read().decode("ascii")
