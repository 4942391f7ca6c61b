"""Tiny shards for tests, written by webdataset."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def jpeg_of(color: tuple[int, int, int], *, size: tuple[int, int] = (40, 30)) -> bytes:
    """A small photograph-like image: a gradient in one colour."""
    ramp = np.linspace(0.2, 1, size[0])[None, :, None] * np.linspace(0.5, 1, size[1])[:, None, None]
    data = io.BytesIO()
    Image.fromarray((ramp * np.array(color)).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()


def write_shards(folder: Path, lengths: list[int], *, info: bool = True) -> Path:
    """Shards whose sample i has key sIIIII, label i and a colour of its own, written by webdataset."""
    folder.mkdir(parents=True, exist_ok=True)
    number, names = 0, []
    for shard, length in enumerate(lengths):
        names.append(f"tiny-train-{shard:04d}.tar")
        with webdataset.TarWriter(str(folder / names[-1])) as writer:
            for _ in range(length):
                color = (number * 37 % 200 + 55, number * 91 % 200 + 55, number * 53 % 200 + 55)
                writer.write({"__key__": f"s{number:05d}", "jpg": jpeg_of(color), "cls": str(number), "json": {}})
                number += 1
    if info:
        split = {"name": "train", "num_samples": number, "filenames": names, "shard_lengths": lengths}
        (folder / "_info.json").write_text(json.dumps({"name": "tiny", "splits": {"train": split}}))
    return folder
