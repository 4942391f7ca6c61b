"""What the crops of a step ask of the hosts' cores, from speeds measured on one core. No torch."""

from __future__ import annotations

# Microseconds of one core (AMD EPYC) for JPEGs that data_prep shrank to 288 pixels: reading and decoding an image, and
# a crop of it, whose cost grows with its pixels. Source: `vitfreeze bench data`,
# benchmarks/results/data_amd_epyc_cpu.txt, for 224 pixels; at 128 pixels the whole was measured 1.14 to 1.19 times as
# fast, no more, because decoding does not know how small the crop will be.
MICROSECONDS_PER_IMAGE = 515.0
MICROSECONDS_PER_CROP = 190.0
MICROSECONDS_PER_PIXEL = 3.74e-3


def core_seconds_per_crop(*, img_size: int, crops_per_image: int) -> float:
    """Return the seconds that one core takes to make a crop of `img_size` x `img_size` pixels for pre-training."""
    crop = MICROSECONDS_PER_CROP + MICROSECONDS_PER_PIXEL * img_size**2
    return 1e-6 * (MICROSECONDS_PER_IMAGE / crops_per_image + crop)
