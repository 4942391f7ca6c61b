"""From bytes to what a network takes, on the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vitfreeze.config import Colours

IMAGENET = Colours()


def normalize(images: Tensor, dtype: torch.dtype = torch.float32, *, colours: Colours = IMAGENET) -> Tensor:
    """Turn uint8 images into normalised ones, on the device they are on.

    Computed in float32 whatever the result's type.

    Args:
        images: (B, 3, H, W) uint8.
        dtype: type of the result.
        colours: mean and deviation; by default ImageNet's.

    Returns:
        (B, 3, H, W) of `dtype`.

    Raises:
        ValueError: the images are not uint8, and so probably normalised already.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"normalize takes uint8 images, not {images.dtype}")
    scale, shift = _affine(images.device, colours)
    return torch.addcmul(shift, images.float(), scale).to(dtype)


@functools.lru_cache(maxsize=16)
def _affine(device: torch.device, colours: Colours) -> tuple[Tensor, Tensor]:
    """Return x -> (x / 255 - mean) / std as one factor and one summand; kept, as copying them would halt the device."""
    mean_C, std_C = (torch.tensor(channels, dtype=torch.float64) for channels in colours)
    scale, shift = 1 / (255 * std_C), -mean_C / std_C
    return scale.float().view(1, 3, 1, 1).to(device), shift.float().view(1, 3, 1, 1).to(device)


@functools.lru_cache(maxsize=16)
def tabulate(device: torch.device, colours: Colours = IMAGENET) -> Tensor:
    """Return what `normalize` makes of every byte of every channel: (3, 256) float32, kept."""
    values = torch.arange(256, dtype=torch.uint8, device=device).expand(1, 3, 1, 256)
    return normalize(values, colours=colours).view(3, 256)
