"""Tiny shards for tests, written by webdataset."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from vitfreeze.data import ReadOptions, TrainLoader


def jpeg_of(color: tuple[int, int, int], *, size: tuple[int, int] = (40, 30)) -> bytes:
    """A small photograph-like image: a gradient in one colour."""
    ramp = np.linspace(0.2, 1, size[0])[None, :, None] * np.linspace(0.5, 1, size[1])[:, None, None]
    data = io.BytesIO()
    Image.fromarray((ramp * np.array(color)).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()


def open_loader(shards: Any, **settings: Any) -> TrainLoader:
    """A loader for training; settings are its arguments and those of its `ReadOptions`, mixed."""
    options = {field.name: settings.pop(field.name) for field in fields(ReadOptions) if field.name in settings}
    return TrainLoader(shards, options=ReadOptions(**options), **settings)


def spoil(path: Path, name: str) -> None:
    """Let a member of a shard be no image."""
    with tarfile.open(path) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    write_tar(path, [(each, b"?" if each == name else data) for each, data in members])


def write_shards(
    folder: Path, lengths: list[int], *, info: bool = True, size: tuple[int, int] = (40, 30), first: int = 0
) -> Path:
    """Shards whose sample i, from `first`, has key sIIIII, label i and a colour of its own, written by webdataset."""
    folder.mkdir(parents=True, exist_ok=True)
    number, names = first, []
    for shard, length in enumerate(lengths):
        names.append(f"tiny-train-{shard:04d}.tar")
        with webdataset.TarWriter(str(folder / names[-1])) as writer:
            for _ in range(length):
                color = (number * 37 % 200 + 55, number * 91 % 200 + 55, number * 53 % 200 + 55)
                writer.write(
                    {"__key__": f"s{number:05d}", "jpg": jpeg_of(color, size=size), "cls": str(number), "json": {}}
                )
                number += 1
    if info:
        split = {"name": "train", "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
        (folder / "_info.json").write_text(json.dumps({"name": "tiny", "splits": {"train": split}}))
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A shard with exactly these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path
