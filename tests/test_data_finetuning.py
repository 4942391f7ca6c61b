"""timm's augmentation, repeatable and without a trace in the global generators."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import write_shards

from vitfreeze.data import BatchMixing, FinetuneTransform, ReadOptions, TrainLoader, normalize


def global_state() -> tuple[object, bytes, bytes]:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()  # type: ignore[index,union-attr]


def test_finetune_batches_do_not_depend_on_workers(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [20, 12])

    def batches(workers: int, world_size: int = 1) -> torch.Tensor:
        loaders = [
            TrainLoader(
                shards,
                img_size=32,
                num_patches=0,
                global_batch=8,
                micro_batch=8 // world_size,
                rank=rank,
                world_size=world_size,
                transform=FinetuneTransform(img_size=32),
                options=ReadOptions(workers=workers, cache_dir=tmp_path),
            )
            for rank in range(world_size)
        ]
        steps = zip(*(loader.batches(0, 8) for loader in loaders), strict=True)
        return torch.cat([batch.images for step in steps for batch in step])

    before = global_state()
    images = batches(0)
    assert global_state() == before
    assert images.shape == (64, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert not torch.equal(images[:32], images[32:])
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(images, batches(2))
    assert torch.equal(images, batches(1, world_size=2))


def test_randaugment_is_applied() -> None:
    """Without crop and mirror, what remains differs from the image by RandAugment alone."""
    from vitfreeze.data.order import SampleRandom

    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    out, draw = torch.empty(3, 32, 32, dtype=torch.uint8), SampleRandom(0)
    changed = {}
    for policy in ("", "rand-m9-mstd0.5-inc1"):
        transform = FinetuneTransform(img_size=32, scale=(1, 1), ratio=(1, 1), hflip=0, auto_augment=policy)
        changed[policy] = 0
        for sample in range(60):
            draw.seek(epoch=0, sample=sample, crop=0)
            transform.apply(pixels, draw, out)
            changed[policy] += not np.array_equal(out.permute(1, 2, 0).numpy(), pixels)
    assert changed[""] == 0
    assert changed["rand-m9-mstd0.5-inc1"] >= 40


def test_strongest_posterizing_gives_black() -> None:
    """timm's scale ends at no bit per colour; Pillow 13 raises there where its forerunners gave black."""
    from vitfreeze.data.order import SampleRandom

    pixels = np.full((16, 16, 3), 200, np.uint8)
    out, draw = torch.empty(3, 16, 16, dtype=torch.uint8), SampleRandom(0)
    transform = FinetuneTransform(
        img_size=16, scale=(1, 1), ratio=(1, 1), hflip=0, auto_augment="rand-m10-n1-p1.0-inc1"
    )
    black = 0
    for sample in range(300):
        draw.seek(epoch=0, sample=sample, crop=0)
        transform.apply(pixels, draw, out)
        black += not out.any()
    assert 3 <= black <= 60


@pytest.mark.parametrize("policy", ["original", "v0", "augmix-m5-w4-d2", "3a"])
def test_timms_other_policies_work(policy: str) -> None:
    from vitfreeze.data.order import SampleRandom

    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    out, draw = torch.empty(3, 16, 16, dtype=torch.uint8), SampleRandom(0)
    transform = FinetuneTransform(img_size=16, auto_augment=policy)
    images = set()
    for sample in range(30):
        draw.seek(epoch=0, sample=sample, crop=0)
        transform.apply(pixels, draw, out)
        images.add(out.numpy().tobytes())
    assert len(images) > 25


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="'random-m9' is no policy"):
        FinetuneTransform(img_size=16, auto_augment="random-m9")


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8, generator=generator), torch.arange(8) % 5


def test_mixing_is_a_function_of_step_and_rank() -> None:
    images, labels = make_batch()
    mixing = BatchMixing(num_classes=5, seed=1)
    before = global_state()
    first, targets = mixing.apply(images, labels, step=3, rank=1)
    assert global_state() == before
    again, targets_again = BatchMixing(num_classes=5, seed=1).apply(images, labels, step=3, rank=1)
    assert torch.equal(first, again)
    assert torch.equal(targets, targets_again)
    for other in ({"step": 4, "rank": 1}, {"step": 3, "rank": 0}, {"step": 3, "rank": 1, "number": 1}):
        assert not torch.equal(first, mixing.apply(images, labels, **other)[0])
    assert first.dtype == torch.float32
    assert targets.shape == (8, 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert (targets.max(1).values < 0.93).all()  # smoothed and mixed


def test_mixup_target_matches_the_mixture() -> None:
    """With mixup alone, the images are the same mixture of a batch and its reverse as the targets."""
    images, labels = make_batch()
    mixing = BatchMixing(num_classes=5, mixup=0.8, cutmix=0, smoothing=0, reprob=0)
    mixed, targets = mixing.apply(images, labels, step=0)
    plain = normalize(images)
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    share = ((targets - one_hot.flip(0)) / (one_hot - one_hot.flip(0))).nanmean()
    torch.testing.assert_close(mixed, plain * share + plain.flip(0) * (1 - share), rtol=1e-4, atol=1e-4)
    assert 0 <= share <= 1


def test_without_mixing_targets_are_smoothed_labels() -> None:
    images, labels = make_batch()
    mixing = BatchMixing(num_classes=5, mixup=0, cutmix=0, reprob=0, smoothing=0.1)
    floats, targets = mixing.apply(images[:7], labels[:7], step=0)
    assert torch.equal(floats, normalize(images[:7]))
    expected = torch.nn.functional.one_hot(labels[:7], 5) * 0.9 + 0.02
    torch.testing.assert_close(targets, expected)


def test_erasing_fills_rectangles() -> None:
    images = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)
    mixing = BatchMixing(num_classes=2, mixup=0, cutmix=0, reprob=0.25)
    floats, _ = mixing.apply(images, torch.zeros(64, dtype=torch.int64), step=0)
    erased = [index for index in range(64) if not torch.equal(floats[index], normalize(images[:1])[0])]
    assert 6 <= len(erased) <= 28


def test_mixing_refuses_what_it_cannot_do() -> None:
    images, labels = make_batch()
    with pytest.raises(ValueError, match="7 is odd"):
        BatchMixing(num_classes=5).apply(images[:7], labels[:7], step=0)
