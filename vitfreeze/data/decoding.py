"""Bytes of an image file -> uint8 pixels, and pixels -> another size.

Ordinary JPEGs take the fast path: simplejpeg decodes them and torch's vectorised antialiased bicubic resizes them.
Both follow the same arithmetic as Pillow (the slow integer DCT, triangle upsampling of the colours, Pillow's filter
support), so a crop differs from Pillow's by rounding only. Everything else goes through Pillow: CMYK, PNG, WebP, and
JPEGs which the decoder merely warns about, so that Pillow decides what is still an image.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vitfreeze.data.errors import BadSampleError

# Pillow's own limit against decompression bombs, and data_prep's; the largest photograph in ImageNet has 62
# million pixels.
MAX_IMAGE_PIXELS = 89_478_485

# Nothing but these: some of Pillow's other readers start programs or follow file names.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")
_FAST_COLORSPACES = frozenset({"YCbCr", "Gray", "RGB"})


@dataclass(frozen=True)
class DecodedImage:
    """Pixels (H, W, 3) uint8, and whether Pillow had to be asked."""

    pixels: np.ndarray
    fell_back: bool


def decode_image(data: bytes, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> DecodedImage:
    """Decode an image file to RGB.

    The size its header claims is checked before anything is allocated.

    Raises:
        BadSampleError: not an image, a broken one, or one larger than `max_image_pixels`.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return DecodedImage(_decode_with_pillow(data, max_image_pixels), True)
    _check_pixels(height, width, max_image_pixels)
    if colorspace in _FAST_COLORSPACES:
        try:
            return DecodedImage(simplejpeg.decode_jpeg(data, "RGB"), False)
        except ValueError:  # any warning of the decoder counts, since strict is its default
            pass
    return DecodedImage(_decode_with_pillow(data, max_image_pixels), True)


def _decode_with_pillow(data: bytes, max_image_pixels: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken metadata, which nobody here reads; sizes, which are checked below
            with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
                _check_pixels(image.height, image.width, max_image_pixels)
                return np.array(_to_eight_bits(image).convert("RGB"))
    except BadSampleError:
        raise
    # Pillow raises nearly anything on broken input: OSError, SyntaxError, struct.error, ValueError, EOFError ...
    except Exception as error:
        reason = str(error).split("<_io")[0].strip() or type(error).__name__  # less the address of the buffer
        raise BadSampleError(f"not a readable image ({reason})") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits of grey to 8, which Pillow would clip to white; raises BadSampleError for deeper pixels."""
    if image.mode in ("F", "I"):
        raise BadSampleError("its pixels are floats or 32-bit integers, which have no agreed black and white")
    if image.mode[0] != "I":
        return image
    return Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))


def _check_pixels(height: int, width: int, max_image_pixels: int) -> None:
    if height < 1 or width < 1:
        raise BadSampleError(f"the image claims {width} x {height} pixels")
    if height * width > max_image_pixels:
        raise BadSampleError(f"the image claims {width} x {height} pixels, over the limit of {max_image_pixels:,}")


def resize_crop(pixels: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """Resize one rectangle of an image, antialiased bicubic as Pillow's.

    Args:
        pixels: (H, W, 3) uint8.
        box: top, left, height, width of the rectangle.
        size: height and width of the result.

    Returns:
        (3, height, width) uint8.
    """
    top, left, height, width = box
    # The crop is made contiguous first: torch has its fast kernel for whole channels-last images only.
    crop = torch.from_numpy(np.ascontiguousarray(pixels[top : top + height, left : left + width]))
    return F.interpolate(crop.permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)[0]
