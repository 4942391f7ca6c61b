"""What is stored for one image, whatever it is."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UndecodableError
from data_prep.images import MAX_FILE_BYTES, MAX_PIXELS, check_file_size, measure_colours, prepare_image
from vitfreeze.data.decoding import MAX_IMAGE_PIXELS, decode_image
from vitfreeze.data.errors import BadSampleError


def picture(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind", "extension"),
    [
        ("RGB", "JPEG", "jpg"),
        ("L", "JPEG", "jpg"),
        ("CMYK", "JPEG", "jpg"),
        ("RGB", "PNG", "png"),
        ("RGBA", "PNG", "png"),
        ("P", "PNG", "png"),
        ("1", "PNG", "png"),
        ("RGB", "WEBP", "webp"),
        ("RGB", "MPO", "jpg"),
    ],
)
def test_original_bytes_are_kept(mode: str, kind: str, extension: str) -> None:
    data = encode(picture(mode), kind)
    stored = prepare_image(data)
    assert (stored.data, stored.extension) == (data, extension)
    assert (stored.height, stored.width, stored.reencoded) == (40, 60, False)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM"])
def test_formats_that_readers_do_not_expect_become_png(kind: str) -> None:
    data = encode(picture(), kind)
    stored = prepare_image(data)
    assert (stored.extension, stored.reencoded) == ("png", True)
    pixels = np.asarray(Image.open(io.BytesIO(stored.data)).convert("RGB"))
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def sixteen_bits() -> np.ndarray:
    return np.linspace(0, 65535, 48, dtype=np.uint16).reshape(6, 8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_alike_by_packer_and_loader(kind: str) -> None:
    """Pillow alone turns all that is brighter than 255 of 65535 white."""
    data = encode(Image.fromarray(sixteen_bits()), kind)
    stored = prepare_image(data)
    pixels = np.asarray(Image.open(io.BytesIO(stored.data)))
    assert (stored.extension, stored.reencoded) == ("png", True)
    np.testing.assert_array_equal(pixels, np.round(sixteen_bits() / 257))
    if kind == "PNG":  # the only one of these that a shard may hold
        np.testing.assert_array_equal(decode_image(data).pixels[..., 0], pixels)
    assert measure_colours(data)[0] == pytest.approx(0.5, abs=0.01)


def test_depths_without_black_and_white_are_refused_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.fromarray(np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)), "TIFF")
    with pytest.raises(UndecodableError, match="floats"):
        prepare_image(data)
    monkeypatch.setattr("vitfreeze.data.decoding._PILLOW_FORMATS", ("TIFF",))
    with pytest.raises(BadSampleError, match="floats"):
        decode_image(data)


def test_packer_and_loader_have_one_limit_of_pixels() -> None:
    assert MAX_PIXELS == MAX_IMAGE_PIXELS


def test_broken_exif_survives() -> None:
    data = encode(picture(), "JPEG")
    block = b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xffgarbage"
    broken = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    assert prepare_image(broken).data == broken
    assert prepare_image(broken, resize_shorter=20).width == 30


def test_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    stored = prepare_image(encode(picture(), "JPEG", exif=exif), resize_shorter=20)
    assert (stored.width, stored.height) == (30, 20)
    assert not Image.open(io.BytesIO(stored.data)).getexif()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P", "1", "I;16"])
def test_shrinking(mode: str) -> None:
    image = picture("L").convert("I;16") if mode == "I;16" else picture(mode)
    stored = prepare_image(encode(image, "JPEG" if mode in ("RGB", "L", "CMYK") else "PNG"), resize_shorter=20)
    shrunk = Image.open(io.BytesIO(stored.data))
    assert (shrunk.format, shrunk.size) == ("JPEG", (30, 20))
    assert shrunk.mode == ("L" if mode in ("L", "I;16") else "RGB")


def test_small_images_are_not_enlarged() -> None:
    data = encode(picture(), "PNG")
    assert prepare_image(data, resize_shorter=40).data == data


def test_extreme_shapes_keep_a_side() -> None:
    stored = prepare_image(encode(picture(size=(2000, 9)), "PNG"), resize_shorter=8)
    assert (stored.width, stored.height) == (1778, 8)


def png_claiming(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_claiming(side: int) -> bytes:
    data = bytearray(encode(picture(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize("side", [11_000, 60_000])  # over the limit here, and over Pillow's own
@pytest.mark.parametrize("claim", [png_claiming, jpeg_claiming])
def test_gigantic_images_are_refused_by_their_header(claim: Callable[[int], bytes], side: int) -> None:
    with pytest.raises(UndecodableError, match=r"pixels.*(refused|exceeds limit)"):
        prepare_image(claim(side))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<!DOCTYPE html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        encode(picture(), "JPEG")[:-200],
        encode(picture(), "PNG")[:-200],
        encode(picture(), "JPEG")[:100],
    ],
)
@pytest.mark.parametrize("resize_shorter", [None, 20])
def test_what_does_not_decode_is_told(data: bytes, resize_shorter: int | None) -> None:
    with pytest.raises(UndecodableError):
        prepare_image(data, resize_shorter=resize_shorter)


def test_file_sizes_are_bounded() -> None:
    check_file_size(MAX_FILE_BYTES)
    with pytest.raises(UndecodableError, match="refused"):
        check_file_size(MAX_FILE_BYTES + 1)
    with pytest.raises(UndecodableError, match="empty"):
        check_file_size(0)
