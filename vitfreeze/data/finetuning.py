"""Fine-tuning's augmentation: timm's, made repeatable.

timm draws from the global generators of Python, numpy and torch. They are seeded from the sample, or from the step, for
the time of one call and then put back, so that a fine-tuning run is as repeatable as pre-training.
"""

from __future__ import annotations

import random as python_random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import (
    RandAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import RandomHorizontalFlip

from vitfreeze.config import Colours, FinetuneConfig, RunConfig, check_argument
from vitfreeze.data.normalization import IMAGENET, normalize
from vitfreeze.data.order import SampleRandom


@contextmanager
def _seeded(seed: Sequence[int], *, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Seed the global generators for a while."""
    words = np.random.SeedSequence(seed).generate_state(3)
    python_state, numpy_state = python_random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device.index or 0 for device in devices]):
        try:
            python_random.seed(int(words[0]))
            np.random.seed(int(words[1]))
            torch.default_generator.manual_seed(int(words[2]))
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(int(words[2]))
            yield
        finally:
            python_random.setstate(python_state)
            np.random.set_state(numpy_state)


class _Posterizing:
    """An operation of RandAugment that may keep no bit at all of a colour, which Pillow 13 refuses: black."""

    def __init__(self, operation: Callable[[Image.Image], Image.Image]) -> None:
        self.operation = operation

    def __call__(self, image: Image.Image) -> Image.Image:
        try:
            return self.operation(image)
        except ValueError:
            return Image.new(image.mode, image.size)


def _make_policy(auto_augment: str, img_size: int, colours: Colours) -> Callable[[Image.Image], Image.Image]:
    """Return a policy with the constants that timm's own training gives it."""
    constants = {
        "translate_const": int(img_size * 0.45),
        "img_mean": tuple(round(255 * mean) for mean in colours.mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        if auto_augment.startswith("augmix"):
            return augment_and_mix_transform(auto_augment, constants | {"translate_pct": 0.3})
        if not auto_augment.startswith("rand-"):
            return auto_augment_transform(auto_augment, constants)
        policy = rand_augment_transform(auto_augment, constants)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"auto_augment {auto_augment!r} is no policy that timm knows") from error
    operations = [_Posterizing(op) if op.name.startswith("Posterize") else op for op in policy.ops]
    return RandAugment(operations, policy.num_layers, policy.choice_weights)


class FinetuneTransform:
    """Random crop, mirror and RandAugment of one image, by timm; for `TrainLoader(transform=...)`.

    Args:
        img_size: side of the result in pixels; a stage of a curriculum may ask for another.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width / height.
        hflip: probability of mirroring.
        auto_augment: timm's policy string; '' for none.
        colours: of the data; the policy fills with their mean.

    Raises:
        ValueError: timm does not know the policy.
    """

    def __init__(
        self,
        *,
        img_size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        auto_augment: str = FinetuneConfig.aa,
        colours: Colours = IMAGENET,
    ) -> None:
        self.img_size = img_size
        self._settings = scale, ratio, hflip, auto_augment, colours
        self._transforms = {img_size: self._make_transforms(img_size)}

    def _make_transforms(self, img_size: int) -> list[Callable[[Image.Image], Image.Image]]:
        scale, ratio, hflip, auto_augment, colours = self._settings
        crop = RandomResizedCropAndInterpolation(img_size, scale=scale, ratio=ratio, interpolation="bicubic")
        policy = [_make_policy(auto_augment, img_size, colours)] if auto_augment else []
        return [crop, RandomHorizontalFlip(hflip), *policy]

    def apply(self, pixels: np.ndarray, random: SampleRandom, out: Tensor) -> None:
        """Write the augmented image into `out`, (3, S, S) uint8; what is drawn does not depend on S."""
        side = out.shape[-1]
        if side not in self._transforms:
            self._transforms[side] = self._make_transforms(side)
        image = Image.fromarray(pixels)
        with _seeded([random.integer()]):
            for transform in self._transforms[side]:
                image = transform(image)
        out.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))


class BatchMixing:
    """Normalising, random erasing, mixup, cutmix and label smoothing of one batch on its device, by timm.

    Args:
        num_classes: length of the target vectors.
        mixup: mixup's alpha; 0 for none (Zhang et al. 2018).
        cutmix: cutmix's alpha; 0 for none (Yun et al. 2019).
        smoothing: label smoothing.
        reprob: probability of erasing a rectangle of an image with noise; 0 for none (Zhong et al. 2020).
        seed: decides, with step and rank, every draw.
        colours: what images are normalised by.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        mixup: float = FinetuneConfig.mixup,
        cutmix: float = FinetuneConfig.cutmix,
        smoothing: float = FinetuneConfig.smoothing,
        reprob: float = FinetuneConfig.reprob,
        seed: int = RunConfig.seed,
        colours: Colours = IMAGENET,
    ) -> None:
        check_argument("finetune.num_classes", num_classes)
        self.num_classes, self.smoothing, self.reprob, self.seed = num_classes, smoothing, reprob, seed
        self.colours = colours
        self._mixup = None
        if mixup or cutmix:
            self._mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def apply(
        self, images: Tensor, labels: Tensor, *, step: int, rank: int = 0, number: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Augment one micro-batch.

        Args:
            images: (B, 3, H, W) uint8.
            labels: (B,) int64 class indices below num_classes, as the loader makes sure.
            step: optimizer step.
            rank: number of this process.
            number: number of the micro-batch within the step.

        Returns:
            (B, 3, H, W) float32 normalised images, and (B, num_classes) float32 targets whose rows sum to 1.

        Raises:
            ValueError: mixing an odd number of images (timm pairs them).
        """
        if self._mixup is not None and len(images) % 2:
            raise ValueError(f"mixup and cutmix pair the images of a micro-batch; {len(images)} is odd")
        floats = normalize(images, colours=self.colours)
        devices = [images.device] if images.device.type == "cuda" else []
        with _seeded([self.seed, step, rank, number], devices=devices):
            if self.reprob:
                erase = RandomErasing(self.reprob, mode="pixel", device=str(images.device))
                floats = erase(floats)
            if self._mixup is not None:
                return self._mixup(floats, labels)
        return floats, mixup_target(labels, self.num_classes, lam=1.0, smoothing=self.smoothing)
