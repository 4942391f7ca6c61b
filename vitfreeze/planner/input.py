"""What the crops of a step ask of the hosts' cores, from speeds measured on one core. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitfreeze.files import read_json

# Microseconds of one core (AMD EPYC). Reading and decoding a JPEG grow with the pixels that are stored: ImageNet's
# photographs with shorter sides of 144 to 288 pixels lie within 4 % of the line. A crop's cost grows with its own
# pixels. Source: `vitfreeze bench data`, benchmarks/results/data_amd_epyc_cpu.txt, for crops of 224 from 288 pixels; at
# 128 pixels the whole was measured 1.14 to 1.19 times as fast, no more, because decoding does not know how small the
# crop will be: shards stored smaller help, `data.train` in stages.
STORED_SIZE = 288
MICROSECONDS_PER_IMAGE, MICROSECONDS_PER_STORED_PIXEL = 36.0, 5.775e-3
MICROSECONDS_PER_CROP, MICROSECONDS_PER_PIXEL = 190.0, 3.74e-3


def core_seconds_per_crop(*, img_size: int, crops_per_image: int, stored_size: int = STORED_SIZE) -> float:
    """Return the seconds that one core takes to make a crop of `img_size` x `img_size` pixels for pre-training.

    Args:
        img_size: side of the crop in pixels.
        crops_per_image: crops that are taken of a decoded image.
        stored_size: shorter side of the JPEGs in pixels.
    """
    image = MICROSECONDS_PER_IMAGE + MICROSECONDS_PER_STORED_PIXEL * stored_size**2
    crop = MICROSECONDS_PER_CROP + MICROSECONDS_PER_PIXEL * img_size**2
    return 1e-6 * (image / crops_per_image + crop)


def find_stored_size(shards: Sequence[str]) -> int:
    """Return the shorter side in pixels to which data_prep shrank shards; `STORED_SIZE` where nothing says."""
    for name in shards:
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        try:
            size = read_json(folder / "manifest.json")["settings"]["resize_shorter"]
        except (ValueError, LookupError, TypeError):
            continue
        if isinstance(size, int):
            return size
    return STORED_SIZE
