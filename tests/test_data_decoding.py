"""The fast path against Pillow and torchvision, on drawn images and on photographs."""

from __future__ import annotations

import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from vitfreeze.data.augmentation import CenterCrop, RandomCrop
from vitfreeze.data.decoding import decode_image, resize_crop
from vitfreeze.data.errors import BadSampleError
from vitfreeze.data.order import SampleRandom


@pytest.fixture(scope="module")
def photographs(shared_dir: Path) -> list[bytes]:
    """Original ImageNet files, among them a CMYK file and a PNG under a JPEG's name."""
    files = []
    with tarfile.open(shared_dir / "images" / "imagenet_mini" / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                files += [inner.extractfile(entry).read() for entry in inner]  # type: ignore[union-attr]
    assert len(files) == 100
    return files


def draw_image(width: int, height: int) -> Image.Image:
    """Waves of all wavelengths with noise: harder to resize than a photograph."""
    generator = np.random.default_rng(width * height)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x**1.5 / scale + y / 7) for scale in (15, 40, 90)]
    return Image.fromarray(
        (np.stack(waves, -1) + generator.normal(0, 10, (height, width, 3))).clip(0, 255).astype("u1")
    )


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one.int() - other.int()).abs().float().mean().item()


def test_decoding_equals_pillow_on_photographs(photographs: list[bytes]) -> None:
    fallbacks = 0
    for data in photographs:
        image = decode_image(data)
        fallbacks += image.fell_back
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(image.pixels, expected)
    assert fallbacks == 2  # the CMYK file and the disguised PNG


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_decoding_equals_pillow_on_kinds_of_jpeg(subsampling: int, mode: str, progressive: bool) -> None:
    data = encode(draw_image(133, 101).convert(mode), quality=80, subsampling=subsampling, progressive=progressive)
    image = decode_image(data)
    assert not image.fell_back
    assert np.array_equal(image.pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def torchvision_crop(data: bytes, box: tuple[int, int, int, int], size: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    crop = TF.resized_crop(image, *box, [size, size], interpolation=v2.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(crop)


def test_random_crops_of_photographs_match_pillow(photographs: list[bytes]) -> None:
    """The mean difference stays under 0.1/255."""
    crop, random, out = RandomCrop(img_size=224), SampleRandom(0), torch.empty(3, 224, 224, dtype=torch.uint8)
    differences = []
    for number, data in enumerate(photographs):
        pixels = decode_image(data).pixels
        random.seek(epoch=0, sample=number, crop=0)
        crop.apply(pixels, random, out)
        random.seek(epoch=0, sample=number, crop=0)
        draws = random.uniform(23).tolist()
        expected = torchvision_crop(data, crop.box(*pixels.shape[:2], draws[1:]), 224)
        differences.append(difference(out, expected.flip(-1) if draws[0] < 0.5 else expected))
    assert np.mean(differences) < 0.1
    assert max(differences) < 0.5


def test_center_crop_of_photographs_matches_torchvision(photographs: list[bytes]) -> None:
    expected_crop = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    out, random = torch.empty(3, 224, 224, dtype=torch.uint8), SampleRandom(0)
    differences = []
    for data in photographs:
        CenterCrop(img_size=224).apply(decode_image(data).pixels, random, out)
        expected = TF.pil_to_tensor(expected_crop(Image.open(io.BytesIO(data)).convert("RGB")))
        differences.append(difference(out, expected))
    assert np.mean(differences) < 0.1
    assert max(differences) < 0.5


@pytest.mark.parametrize("box", [(0, 0, 90, 120), (3, 5, 64, 64), (10, 20, 70, 31), (89, 119, 1, 1), (0, 0, 1, 120)])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 48)])
def test_resizing_matches_pillow(box: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    image = draw_image(120, 90)
    top, left, height, width = box
    expected = image.crop((left, top, left + width, top + height)).resize(size[::-1], Image.Resampling.BICUBIC)
    found = resize_crop(np.array(image), box, size)
    assert found.is_contiguous()
    assert difference(found, TF.pil_to_tensor(expected)) < 0.3
    assert (found.int() - TF.pil_to_tensor(expected).int()).abs().max() <= 3


def test_random_boxes_follow_torchvisions_law() -> None:
    """Same distribution of area and shape, compared by their means over many draws."""
    crop, random = RandomCrop(img_size=32, scale=(0.2, 1.0)), SampleRandom(1)
    height, width, count = 300, 400, 4000
    ours = np.empty((count, 4))
    for number in range(count):
        random.seek(epoch=0, sample=number, crop=0)
        ours[number] = crop.box(height, width, random.uniform(23).tolist()[1:])
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(32, scale=(0.2, 1.0))
    image = torch.empty(3, height, width, dtype=torch.uint8)
    theirs = []
    for _ in range(count):
        params = reference.make_params([image])
        theirs.append([params[name] for name in ("top", "left", "height", "width")])
    for column in range(4):
        one, other = ours[:, column], np.array(theirs)[:, column]
        error = math.sqrt(2) * other.std() / math.sqrt(count)
        assert abs(one.mean() - other.mean()) < 4 * error
        assert abs(one.std() / other.std() - 1) < 0.08


@pytest.mark.parametrize(("height", "width"), [(10, 500), (500, 10), (1, 1), (2, 900)])
def test_boxes_of_extreme_shapes_lie_inside(height: int, width: int) -> None:
    crop, random, out = RandomCrop(img_size=16), SampleRandom(2), torch.empty(3, 16, 16, dtype=torch.uint8)
    pixels = np.zeros((height, width, 3), np.uint8)
    for number in range(50):
        random.seek(epoch=0, sample=number, crop=0)
        top, left, box_height, box_width = crop.box(height, width, random.uniform(23).tolist()[1:])
        assert top >= 0
        assert left >= 0
        assert box_height >= 1
        assert box_width >= 1
        assert top + box_height <= height
        assert left + box_width <= width
        crop.apply(pixels, random, out)


def test_size_limit_holds_on_both_paths() -> None:
    image = draw_image(60, 50)
    for data in (encode(image), encode(image, "PNG")):
        assert decode_image(data, max_image_pixels=3000).pixels.shape == (50, 60, 3)
        with pytest.raises(BadSampleError, match="claims 60 x 50 pixels, over the limit of 2,999"):
            decode_image(data, max_image_pixels=2999)


def test_sample_random_streams_are_repeatable_and_apart() -> None:
    random = SampleRandom(7)

    def draw(**place: int) -> list[float]:
        random.seek(**place)
        noise = np.empty(5, np.float32)
        random.fill(noise)
        return [*random.uniform(5).tolist(), *noise.tolist()]

    first = draw(epoch=1, sample=2, crop=3)
    draw(epoch=9, sample=9, crop=9)
    assert draw(epoch=1, sample=2, crop=3) == first
    places = [(epoch, sample, crop) for epoch in range(4) for sample in range(20) for crop in range(3)]
    values = [value for epoch, sample, crop in places for value in draw(epoch=epoch, sample=sample, crop=crop)]
    assert len(set(values)) == len(values)
    assert SampleRandom(8).uniform(1) != SampleRandom(7).uniform(1)


def test_sample_random_survives_the_way_to_a_worker() -> None:
    import pickle

    random = SampleRandom(7)
    copy = pickle.loads(pickle.dumps(random))
    for one in (random, copy):
        one.seek(epoch=1, sample=2, crop=0)
    assert random.uniform(4).tolist() == copy.uniform(4).tolist()


def test_mask_noise_is_uniform() -> None:
    random, noise = SampleRandom(0), np.empty((400, 196), np.float32)
    for number, row in enumerate(noise):
        random.seek(epoch=0, sample=number, crop=0)
        random.uniform(23)
        random.fill(row)
    assert abs(noise.mean() - 0.5) < 0.005
    assert abs(noise.std() - 1 / math.sqrt(12)) < 0.003
    assert noise.max() < 1
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.02
