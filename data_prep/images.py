"""One image file in, the bytes to store out: checked by decoding, converted only where that is asked for.

Files come from archives that nobody vouches for: the size is read from the header before a pixel is decoded, and only
the formats named here are opened (Pillow would hand an EPS file to Ghostscript).
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.errors import UndecodableError

# The loader's limit too (vitfreeze/data/decoding.py), and Pillow's own against decompression bombs. The largest
# photograph of ImageNet has 61 million pixels.
MAX_PIXELS = 89_478_485
MAX_FILE_BYTES = 256 * 2**20
# What readers of shards expect. MPO is what Pillow calls a JPEG with more pictures behind the first.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
OPENED_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # the last four are stored as PNG
DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class StoredImage:
    """What a shard gets for one image; height and width are those of the stored file."""

    data: bytes
    extension: str
    height: int
    width: int
    reencoded: bool = False


def prepare_image(data: bytes, *, resize_shorter: int | None = None, quality: int = DEFAULT_QUALITY) -> StoredImage:
    """Decode the image to know that it can be decoded, and give the bytes to store.

    The original bytes are kept (16 bits of grey become 8), named by their true content: readers choose the decoder by
    the extension, so ImageNet's one PNG that is called .JPEG becomes .png. With `resize_shorter`, an image whose
    shorter side is larger is shrunk to it (bicubic with antialiasing, aspect kept) and stored as JPEG; a smaller one
    keeps its bytes. Orientation tags are not applied, as in torchvision's ImageFolder, and a shrunk image drops its
    metadata.

    Raises:
        UndecodableError: no image, damaged, or larger than MAX_PIXELS or MAX_FILE_BYTES.
    """
    check_file_size(len(data))
    try:
        # Pillow warns about large sizes and odd metadata; the size is checked here and the metadata is not used.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _prepare(data, resize_shorter, quality)
    except (UndecodableError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, IndexError and others
        raise UndecodableError(f"{type(error).__name__}: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """Return an error's text without memory addresses, so that two packs of the same input say the same."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))


def check_file_size(size: int) -> None:
    """Refuse a file that is too large to be one image, before it is read.

    Raises:
        UndecodableError: `size` is over MAX_FILE_BYTES, or 0.
    """
    if size == 0:
        raise UndecodableError("the file is empty")
    if size > MAX_FILE_BYTES:
        raise UndecodableError(f"the file has {size} bytes, more than {MAX_FILE_BYTES} are refused")


def open_image(data: bytes) -> Image.Image:
    """Read the header only.

    Raises:
        UndecodableError: the header claims more than MAX_PIXELS.
        Exception: whatever Pillow raises when this is no image.
    """
    image = Image.open(io.BytesIO(data), formats=OPENED_FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UndecodableError(f"its header claims {width} x {height} pixels, more than {MAX_PIXELS} are refused")
    return image


def _prepare(data: bytes, resize_shorter: int | None, quality: int) -> StoredImage:
    image = open_image(data)
    width, height = image.size
    if resize_shorter is not None and min(width, height) > resize_shorter:
        return _shrink(image, resize_shorter, quality)
    if image.format not in EXTENSIONS or image.mode[0] in "IF":
        return _encode(_pixels(image), "PNG")
    # A JPEG decoded at an eighth still has every bit read, at a fraction of the time.
    image.draft(None, (max(1, width // 8), max(1, height // 8)))
    image.load()
    return StoredImage(data, EXTENSIONS[image.format], height, width)


def _shrink(image: Image.Image, shorter: int, quality: int) -> StoredImage:
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(side * scale)) for side in image.size)
    return _encode(_pixels(image).resize((width, height), Image.Resampling.BICUBIC), "JPEG", quality=quality)


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits to 8; Pillow's own conversion turns all that is brighter than 255 of 65535 white.

    Raises:
        UndecodableError: its pixels are floats or 32-bit integers, whose black and white nobody knows.
    """
    if image.mode in ("F", "I") and not (image.mode == "I" and image.format == "PPM"):  # a PGM's 16 bits are mode I
        kind = {"F": "floats", "I": "32-bit integers"}[image.mode]
        raise UndecodableError(f"its pixels are {kind}, which have no agreed black and white: store 8 or 16 bits")
    if image.mode[0] != "I":
        return image
    return Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))


def measure_colours(data: bytes) -> np.ndarray:
    """Mean and mean square of R, G and B over an image's pixels, as shares of white: (2, 3) float64.

    Raises:
        UndecodableError: it is no image.
    """
    try:
        pixels = np.asarray(to_eight_bits(open_image(data)).convert("RGB"), dtype=np.float32).reshape(-1, 3) / 255
    except OSError as error:
        raise UndecodableError(_describe(error)) from error
    return np.stack([pixels.mean(0, dtype=np.float64), np.square(pixels).mean(0, dtype=np.float64)])


def _pixels(image: Image.Image) -> Image.Image:
    image = to_eight_bits(image)
    return image if image.mode == "L" else image.convert("RGB")


def _encode(image: Image.Image, kind: str, **options: int) -> StoredImage:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return StoredImage(buffer.getvalue(), EXTENSIONS[kind], image.height, image.width, reencoded=True)
