"""Labelled images drawn from a seed: a data set that needs no download.

A class is a shape with a texture. Colours, place, scale, rotation and background are drawn at random for every image,
so that raw pixels tell little about the class and edges tell a lot. Only arithmetic that IEEE 754 rounds exactly is
used (no sine, no exponential), so that every machine draws the same pixels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.catalogue import Catalogue, ImageSet, Record
from data_prep.errors import InputError

JPEG_QUALITY = 90
TRAIN_FRACTION = 0.8
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 16, 1024
Plane = np.ndarray  # (size, size) float64
SQRT3 = 1.7320508075688772


# Shapes: signed distance (negative inside) in the shape's own coordinates; each fits in the unit circle.
def _disc(x: Plane, y: Plane) -> Plane:
    return np.sqrt(x * x + y * y) - 0.85


def _triangle(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x) * (SQRT3 / 2) + y * 0.5, -y) - 0.5


def _cross(x: Plane, y: Plane) -> Plane:
    wide = np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.3)
    tall = np.maximum(np.abs(x) - 0.3, np.abs(y) - 0.95)
    return np.minimum(wide, tall)


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.sqrt(x * x + y * y) - 0.68) - 0.27


# Textures: 0 or 1 per pixel, in the shape's own coordinates.
def _plain(x: Plane, y: Plane) -> Plane:
    return np.zeros_like(x)


def _stripes(x: Plane, y: Plane) -> Plane:
    return np.floor(x * 3.0) % 2


def _checks(x: Plane, y: Plane) -> Plane:
    return (np.floor(x * 3.0) + np.floor(y * 3.0)) % 2


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "cross": _cross,
    "disc": _disc,
    "ring": _ring,
    "triangle": _triangle,
}
TEXTURES: dict[str, Callable[[Plane, Plane], Plane]] = {"checks": _checks, "plain": _plain, "stripes": _stripes}
CLASSES = tuple(f"{shape}_{texture}" for shape in SHAPES for texture in TEXTURES)  # sorted, as labels are


@dataclass(frozen=True)
class Drawing:
    """One image to be drawn; the same fields always give the same bytes."""

    seed: int
    split: int
    position: int
    label: int
    image_size: int

    def read(self) -> bytes:
        """Draw the image.

        Returns:
            a JPEG file of image_size x image_size pixels.
        """
        rng = np.random.default_rng([self.seed, self.split, self.position])
        pixels = draw_pixels(CLASSES[self.label], image_size=self.image_size, rng=rng)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()


class DrawnCatalogue:
    """A split of drawn images, classes in equal numbers."""

    def __init__(self, num_samples: int, *, name: str, split: int, seed: int, image_size: int) -> None:
        self._num_samples, self._name, self._split = num_samples, name, split
        self._seed, self._image_size = seed, image_size

    def __len__(self) -> int:
        return self._num_samples

    def records(self, positions: Iterable[int]) -> list[Record]:
        """The images at these positions."""
        return [self._record(int(position)) for position in positions]

    def _record(self, position: int) -> Record:
        label = position % len(CLASSES)
        key = f"{self._name}_{CLASSES[label]}_{position:06d}"
        drawing = Drawing(self._seed, self._split, position, label, self._image_size)
        return Record(key, f"{key}.jpg", label, drawing)

    def fingerprint(self) -> str:
        """SHA-256 over what decides the drawings."""
        text = f"{self._num_samples} {self._name} {self._split} {self._seed} {self._image_size} {CLASSES}"
        return hashlib.sha256(text.encode()).hexdigest()

    def total_bytes(self) -> int:
        """A generous guess: nothing has been drawn yet."""
        return self._num_samples * self._image_size * self._image_size


def draw_image_set(num_samples: int, *, seed: int, image_size: int) -> ImageSet:
    """A drawn data set with a training and a validation split (four to one).

    Raises:
        InputError: fewer samples than give every class one image in each split, or an odd size.
    """
    num_train = round(num_samples * TRAIN_FRACTION)
    if num_samples - num_train < len(CLASSES):
        raise InputError(f"--samples must be at least {len(CLASSES) * 5}, five for each class, not {num_samples}.")
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise InputError(f"--size must be between {MIN_IMAGE_SIZE} and {MAX_IMAGE_SIZE} pixels, not {image_size}.")
    if seed < 0:
        raise InputError(f"--seed must be 0 or more, not {seed}.")
    sizes = {"train": num_train, "validation": num_samples - num_train}
    splits: dict[str, Catalogue] = {
        name: DrawnCatalogue(count, name=name, split=number, seed=seed, image_size=image_size)
        for number, (name, count) in enumerate(sizes.items())
    }
    return ImageSet(CLASSES, splits, drawn=True)


def draw_pixels(class_name: str, *, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one object of a class before a random background.

    Returns:
        uint8 (image_size, image_size, 3).
    """
    shape_name, texture_name = class_name.split("_")
    side = (np.arange(image_size) + 0.5) / image_size * 2 - 1
    x, y = np.meshgrid(side, side)
    scale = rng.uniform(0.5, 0.85)
    centre_x, centre_y = rng.uniform(-0.95 + scale, 0.95 - scale, size=2) if scale < 0.95 else (0.0, 0.0)
    cosine, sine = _draw_direction(rng)
    own_x = ((x - centre_x) * cosine + (y - centre_y) * sine) / scale
    own_y = ((y - centre_y) * cosine - (x - centre_x) * sine) / scale

    background = _draw_background(x, y, rng)
    colours = _draw_object_colours(rng)
    texture = TEXTURES[texture_name](own_x, own_y)[..., None]
    foreground = colours[0] * (1 - texture) + colours[1] * texture
    coverage = np.clip(0.5 - SHAPES[shape_name](own_x, own_y) * scale * image_size / 2, 0, 1)[..., None]
    light = 1 + rng.uniform(-0.25, 0.25) * x + rng.uniform(-0.25, 0.25) * y
    image = (background * (1 - coverage) + foreground * coverage) * light[..., None]
    image = image + rng.uniform(-0.03, 0.03, size=image.shape)
    return np.floor(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _draw_direction(rng: np.random.Generator) -> tuple[float, float]:
    """Cosine and sine of a random angle within +-27 degrees: upright, as objects in photographs mostly are."""
    tangent = rng.uniform(-0.5, 0.5)
    length = (1 + tangent * tangent) ** 0.5
    return 1 / length, tangent / length


def _draw_background(x: Plane, y: Plane, rng: np.random.Generator) -> np.ndarray:
    """Two colours blended along a random direction, with soft random blobs."""
    first, second, third = rng.uniform(0.05, 0.95, size=(3, 3))
    slope_x, slope_y = rng.uniform(-0.5, 0.5, size=2)
    blend = np.clip(0.5 + slope_x * x + slope_y * y, 0, 1)[..., None]
    background = first * (1 - blend) + second * blend
    for _ in range(3):
        centre_x, centre_y = rng.uniform(-1, 1, size=2)
        radius = rng.uniform(0.2, 0.6)
        distance = ((x - centre_x) * (x - centre_x) + (y - centre_y) * (y - centre_y)) / (radius * radius)
        blob = (0.6 / (1 + distance * distance))[..., None]
        background = background * (1 - blob) + third * blob
    return background


def _draw_object_colours(rng: np.random.Generator) -> np.ndarray:
    """Two colours (2, 3) that differ enough in brightness for the texture to be seen."""
    while True:
        colours = rng.uniform(0, 1, size=(2, 3))
        if abs(colours[0].mean() - colours[1].mean()) > 0.3:
            return colours
