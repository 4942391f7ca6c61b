"""A set of images to a folder of shards: plan, write in parallel, resume.

The same images and settings give the same bytes whatever the number of workers, because which image lies where is
decided here, before any work is handed out.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from data_prep.catalogue import Catalogue, ImageSet
from data_prep.errors import InputError, OutputError
from data_prep.images import DEFAULT_QUALITY
from data_prep.manifest import SKIPPED, Journal, Manifest, write_descriptions
from data_prep.progress import show_progress
from data_prep.shards import ShardEntry, shard_names
from data_prep.workers import run_tasks
from data_prep.writer import PRELOADED, ShardTask, finish_shard

# 1,281,167 and 50,000 images then make 1024 and 64 shards, as in timm/imagenet-1k-wds.
DEFAULT_SAMPLES_PER_SHARD = {"train": 1252, "validation": 782}
BYTES_AROUND_IMAGE = 2560  # three headers, label and JSON, padding


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How to pack; `samples_per_shard` None takes ImageNet's customary sizes, `resize_shorter` None keeps the bytes."""

    dataset: str
    seed: int = 0
    samples_per_shard: int | None = None
    resize_shorter: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"--seed must be 0 or more, not {self.seed}.")
        if self.samples_per_shard is not None and self.samples_per_shard < 1:
            raise InputError(f"--samples-per-shard must be at least 1, not {self.samples_per_shard}.")
        if self.resize_shorter is not None and self.resize_shorter < 8:
            raise InputError(f"--resize-shorter must be at least 8 pixels, not {self.resize_shorter}.")
        if self.quality is not None and self.resize_shorter is None:
            raise InputError("--quality is for shrunk images: give --resize-shorter too, or leave it out.")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise InputError(f"--quality must be between 1 and 100, not {self.quality}.")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.dataset):
            raise InputError(f"--name must consist of letters, digits, '_' and '-', not {self.dataset!r}.")

    @property
    def jpeg_quality(self) -> int:
        return DEFAULT_QUALITY if self.quality is None else self.quality

    def shard_size(self, split: str) -> int:
        return self.samples_per_shard or DEFAULT_SAMPLES_PER_SHARD[split]


@dataclass(frozen=True)
class PackSummary:
    """What a run has done, over all splits."""

    manifest: Manifest
    num_kept: int
    seconds: float

    def __str__(self) -> str:
        shards = self.manifest.shards
        lines = []
        for split in dict.fromkeys(entry.split for entry in shards):
            entries = [entry for entry in shards if entry.split == split]
            samples = sum(entry.num_samples for entry in entries)
            megabytes = sum(entry.num_bytes for entry in entries) / 1e6
            lines.append(f"{split}: {samples} samples in {len(entries)} shards, {megabytes:.1f} MB")
        lines.append(f"classes: {len(self.manifest.classes) or 'none, the samples have no labels'}")
        lines.append(f"took {self.seconds:.1f} s; {self.num_kept} of {len(shards)} shards were there already")
        disguised = sum(entry.num_disguised for entry in shards)
        reencoded = sum(entry.num_reencoded for entry in shards)
        skipped = sum(len(entry.skipped) for entry in shards)
        if disguised:
            lines.append(f"named by their content because their extension tells another format: {disguised}")
        if reencoded:
            lines.append(f"shrunk or converted: {reencoded}")
        see = ", see skipped.jsonl" if skipped else ""
        lines.append(f"left out because they do not decode: {skipped}{see}")
        return "\n".join(lines)


def pack(images: ImageSet, folder: Path, *, settings: PackSettings, workers: int) -> PackSummary:
    """Write the shards and their description files; finished shards of an earlier run are kept.

    Raises:
        InputError: nothing to pack, no image of a split decodes, or the folder holds the work of another command.
        OutputError: the result cannot be written; what is finished stays, and the same call goes on from there.
    """
    start = time.monotonic()
    for split, catalogue in images.splits.items():
        if not len(catalogue):
            raise InputError(f"there is no image in the {split} split.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}.") from error
    recorded = _settings_to_record(images, settings)
    with Journal(folder, recorded) as journal:
        if not journal.finished:
            _check_free_space(folder, images, settings)
        entries = _write_shards(images, folder, settings=settings, journal=journal, workers=workers)
        manifest = Manifest(recorded, sorted(entries, key=lambda entry: (entry.split, entry.name)))
        write_descriptions(folder, dataset=settings.dataset, manifest=manifest)
        journal.remove()
    for split in images.splits:
        if not any(entry.num_samples for entry in entries if entry.split == split):
            raise InputError(f"none of the images in the {split} split decodes: {folder / SKIPPED} gives the reasons.")
    return PackSummary(manifest, sum(entry.kept for entry in entries), time.monotonic() - start)


def _write_shards(
    images: ImageSet, folder: Path, *, settings: PackSettings, journal: Journal, workers: int
) -> list[ShardEntry]:
    plan = [shard for split, catalogue in images.splits.items() for shard in _plan_shards(split, catalogue, settings)]
    tasks = (
        ShardTask(
            folder=folder, name=name, split=split, records=images.splits[split].records(positions),
            resize_shorter=settings.resize_shorter, quality=settings.jpeg_quality, finished=journal.finished.get(name),
        )
        for split, name, positions in plan
    )  # fmt: skip
    entries = []
    total = sum(len(catalogue) for catalogue in images.splits.values())
    with show_progress("packing", total=total) as advance:
        for entry in run_tasks(finish_shard, tasks, workers=min(workers, len(plan)), preload=PRELOADED):
            if not entry.kept:
                journal.add(entry)
            entries.append(entry)
            advance(entry.num_samples + len(entry.skipped), 0 if entry.kept else entry.num_bytes)
    return entries


def _plan_shards(split: str, catalogue: Catalogue, settings: PackSettings) -> list[tuple[str, str, np.ndarray]]:
    """Split, name and positions of every shard: one shuffle of the split, cut into parts that differ by one at most."""
    size = settings.shard_size(split)
    count = math.ceil(len(catalogue) / size)
    # The raw stream of PCG64 is the same in every version of numpy; Generator.permutation need not be.
    order = np.argsort(np.random.PCG64(settings.seed).random_raw(len(catalogue)), kind="stable")
    names = shard_names(settings.dataset, split, count)
    return [(split, *shard) for shard in zip(names, np.array_split(order, count), strict=True)]


def _settings_to_record(images: ImageSet, settings: PackSettings) -> dict[str, Any]:
    """Everything that decides the bytes of the shards, and nothing else: no path, no number of workers."""
    return {
        "dataset": settings.dataset,
        "seed": settings.seed,
        "samples_per_shard": {split: settings.shard_size(split) for split in images.splits},
        "resize_shorter": settings.resize_shorter,
        "quality": settings.jpeg_quality if settings.resize_shorter is not None else None,
        "pillow": PIL.__version__ if settings.resize_shorter is not None or images.drawn else None,
        "classes": list(images.classes),
        "splits": {
            split: {"images": len(catalogue), "sha256": catalogue.fingerprint()}
            for split, catalogue in images.splits.items()
        },
    }


def _check_free_space(folder: Path, images: ImageSet, settings: PackSettings) -> None:
    if settings.resize_shorter is not None:
        return  # the size is not known before the images are shrunk
    needed = sum(catalogue.total_bytes() + len(catalogue) * BYTES_AROUND_IMAGE for catalogue in images.splits.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"the shards need about {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB free: none was written."
        )
