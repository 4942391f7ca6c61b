"""What happens to a decoded image before it joins a batch: LocalMIM's crop, evaluation's crop, fine-tuning's set.

Each transform is a frozen setting with one method, and writes its uint8 result into the batch. Normalising, erasing
and mixing happen on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from vitfreeze.config import DataConfig, check_argument
from vitfreeze.data.decoding import resize_crop
from vitfreeze.data.order import SampleRandom

CROP_PCT = 0.875  # of an evaluated image's shorter side: the usual 256 -> 224
_CROP_ATTEMPTS = 10
_MIRRORED = 0.5  # share of the training images
_LEAST_RATIO, _GREATEST_RATIO = 3 / 4, 4 / 3  # width / height of a training crop


class Transform(Protocol):
    """Anything that makes one uint8 (3, H, W) image of decoded pixels (H, W, 3)."""

    @property
    def img_size(self) -> int:
        """Side of the image in pixels."""

    def apply(self, pixels: np.ndarray, random: SampleRandom, out: Tensor) -> None:
        """Write the image into `out`, drawing every random number from `random`."""


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """LocalMIM's augmentation: a random rectangle resized to a square, bicubic, and mirrored half of the time.

    The rectangle is that of Inception (Szegedy et al. 2015), as torchvision's RandomResizedCrop draws it.

    Args:
        img_size: side of the result in pixels; a stage of a curriculum may ask for another.
        scale: least and greatest share of the image's area.
    """

    img_size: int
    scale: tuple[float, float] = DataConfig.crop_scale

    def __post_init__(self) -> None:
        if self.img_size < 1:
            raise ValueError(f"img_size is {self.img_size}; an image has at least 1 pixel")
        check_argument("data.crop_scale", self.scale, name="scale")

    def apply(self, pixels: np.ndarray, random: SampleRandom, out: Tensor) -> None:
        draws = random.uniform(3 + 2 * _CROP_ATTEMPTS).tolist()
        box = self.box(pixels.shape[0], pixels.shape[1], draws[1:])
        image = resize_crop(pixels, box, (out.shape[-2], out.shape[-1]))
        out.copy_(image.flip(-1) if draws[0] < _MIRRORED else image)

    def box(self, height: int, width: int, draws: list[float]) -> tuple[int, int, int, int]:
        """Return top, left, height, width of the rectangle that 2 + 2 * 10 uniform numbers choose."""
        offset_y, offset_x = draws[:2]
        log_least, log_greatest = math.log(_LEAST_RATIO), math.log(_GREATEST_RATIO)
        for attempt in range(1, _CROP_ATTEMPTS + 1):
            area_draw, ratio_draw = draws[2 * attempt : 2 * attempt + 2]
            area = height * width * (self.scale[0] + area_draw * (self.scale[1] - self.scale[0]))
            aspect = math.exp(log_least + ratio_draw * (log_greatest - log_least))
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top, left = int(offset_y * (height - crop_height + 1)), int(offset_x * (width - crop_width + 1))
                return top, left, crop_height, crop_width
        return _central_box(height, width)


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Return the largest central rectangle whose shape is allowed."""
    crop_height = min(height, max(1, round(width / _LEAST_RATIO)))
    crop_width = min(width, max(1, round(height * _GREATEST_RATIO)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """Evaluation: the shorter side to img_size / CROP_PCT, bicubic, then the central square."""

    img_size: int

    def apply(self, pixels: np.ndarray, random: SampleRandom, out: Tensor) -> None:
        height, width = pixels.shape[:2]
        shorter = round(self.img_size / CROP_PCT)
        if height < width:
            size = (shorter, int(shorter * width / height))
        else:
            size = (int(shorter * height / width), shorter)
        image = resize_crop(pixels, (0, 0, height, width), size)
        top, left = round((size[0] - self.img_size) / 2), round((size[1] - self.img_size) / 2)
        out.copy_(image[:, top : top + self.img_size, left : left + self.img_size])
