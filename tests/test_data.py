"""Batches: the same whatever makes them, every sample once, from any step on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import open_loader, write_shards

from vitfreeze.data import (
    Batch,
    BatchShape,
    EpochOrder,
    EvalLoader,
    ReadOptions,
    ShardError,
    TrainLoader,
    normalize,
    workers_needed,
)

LENGTHS = [13, 7, 20, 0, 11, 9, 5]  # 65 samples


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), LENGTHS)


@pytest.fixture
def make_loader(shards: Path, tmp_path: Path) -> Callable[..., TrainLoader]:
    def make(**settings: object) -> TrainLoader:
        defaults = {
            "img_size": 16,
            "num_patches": 4,
            "global_batch": 8,
            "micro_batch": 8,
            "seed": 3,
            "workers": 0,
            "window_shards": 3,
            "cache_dir": tmp_path / "cache",
        }
        return open_loader(shards, **(defaults | settings))

    return make


def global_batches(loaders: list[TrainLoader], start: int, stop: int) -> dict[int, list[Batch]]:
    """What all ranks together feed into each step, in the order of accumulation."""
    steps: dict[int, list[Batch]] = {}
    for micro_batches in zip(*(loader.batches(start, stop) for loader in loaders), strict=True):
        for batch in micro_batches:
            steps.setdefault(batch.step, []).append(batch)
    return steps


def joined(batches: list[Batch]) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    keys = [key for batch in batches for key in batch.keys]
    return keys, *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("labels", "images", "noise"))


@pytest.mark.parametrize(
    ("world_size", "workers", "micro_batch"), [(1, 4, 8), (2, 2, 4), (4, 1, 2), (2, 0, 2), (1, 0, 2)]
)
def test_global_batches_are_the_same_whoever_makes_them(
    make_loader: Callable[..., TrainLoader], world_size: int, workers: int, micro_batch: int
) -> None:
    expected = global_batches([make_loader()], 5, 11)
    loaders = [
        make_loader(rank=rank, world_size=world_size, workers=workers, micro_batch=micro_batch)
        for rank in range(world_size)
    ]
    found = global_batches(loaders, 5, 11)
    assert found.keys() == expected.keys() == set(range(5, 11))
    for step, batches in expected.items():
        keys, *tensors = joined(batches)
        found_keys, *found_tensors = joined(found[step])
        assert found_keys == keys
        for tensor, found_tensor in zip(tensors, found_tensors, strict=True):
            assert torch.equal(tensor, found_tensor)


def test_every_sample_comes_once_per_epoch(make_loader: Callable[..., TrainLoader]) -> None:
    loader = make_loader(global_batch=5, micro_batch=5)
    assert (loader.num_samples, loader.steps_per_epoch) == (65, 13)
    epochs: dict[int, list[str]] = {}
    for batch in loader.batches(0, 26):
        assert batch.epoch == batch.step // 13
        assert [f"s{label:05d}" for label in batch.labels.tolist()] == list(batch.keys)
        assert torch.equal(batch.indices, batch.labels)
        epochs.setdefault(batch.epoch, []).extend(batch.keys)
    everyone = [f"s{number:05d}" for number in range(65)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == everyone
    assert epochs[0] != epochs[1]
    assert epochs[0] != everyone
    assert [report.images for report in loader.take_reports()] == [65, 65]


def test_remainder_of_the_last_global_batch_is_left_out(make_loader: Callable[..., TrainLoader]) -> None:
    loader = make_loader()
    assert loader.steps_per_epoch == 8
    keys = [key for batch in loader.batches(0, 8) for key in batch.keys]
    assert len(keys) == len(set(keys)) == 64


@pytest.mark.parametrize("stop", [1, 7, 8, 13])
def test_resume_on_another_world_size_gives_the_rest(make_loader: Callable[..., TrainLoader], stop: int) -> None:
    whole = global_batches([make_loader()], 0, 16)
    rest = global_batches([make_loader(rank=rank, world_size=4, micro_batch=1) for rank in range(4)], stop, 16)
    assert set(rest) == set(range(stop, 16))
    for step, batches in rest.items():
        keys, _, images, noise = joined(batches)
        assert keys == list(whole[step][0].keys)
        assert torch.equal(images, whole[step][0].images)
        assert torch.equal(noise, whole[step][0].noise)


def test_batches_are_ready_for_the_device(make_loader: Callable[..., TrainLoader]) -> None:
    for workers in (0, 1):
        batch = next(make_loader(workers=workers).batches(0, 1))
        assert batch.images.shape == (8, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert batch.labels.dtype == torch.int64
        assert batch.noise.shape == (8, 4)
        assert batch.noise.dtype == torch.float32
        assert 0 <= batch.noise.min() <= batch.noise.max() < 1
        assert batch.wait_seconds > 0


def test_crops_of_one_image_differ_and_the_epoch_grows(make_loader: Callable[..., TrainLoader]) -> None:
    loader = make_loader(crops_per_image=4)
    assert loader.steps_per_epoch == 65 * 4 // 8
    keys = []
    for batch in loader.batches(0, loader.steps_per_epoch):
        assert list(batch.keys) == [batch.keys[0]] * 4 + [batch.keys[4]] * 4
        assert len({tuple(row) for row in batch.noise.tolist()}) == 8
        assert len({image.numpy().tobytes() for image in batch.images}) == 8
        keys += [batch.keys[0], batch.keys[4]]
    assert len(keys) == len(set(keys)) == 64
    (report,) = loader.take_reports()
    assert report.images == 64


def test_micro_batch_may_change_in_the_middle(make_loader: Callable[..., TrainLoader]) -> None:
    loader = make_loader()
    (whole,) = loader.batches(2, 3)
    parts = list(loader.batches(2, 3, micro_batch=2))
    assert [len(part.images) for part in parts] == [2, 2, 2, 2]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once(shards: Path, tmp_path: Path, world_size: int, workers: int) -> None:
    keys: list[str] = []
    for rank in range(world_size):
        loader = EvalLoader(
            shards,
            img_size=16,
            batch_size=10,
            rank=rank,
            world_size=world_size,
            split="train",
            options=ReadOptions(workers=workers, cache_dir=tmp_path),
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        keys += [key for batch in batches for key in batch.keys]
    assert keys == [f"s{number:05d}" for number in range(65)]


def test_order_is_local_within_windows() -> None:
    """At any time the samples come from `window_shards` shards, and from all of those."""
    lengths = [50] * 40
    order = EpochOrder(lengths, seed=0, window_shards=4)
    samples = order.indices(3, 0, 2000)
    assert sorted(samples) == list(range(2000))
    for window in range(10):
        found = np.unique(samples[window * 200 : (window + 1) * 200] // 50)
        assert len(found) == 4
    first_blocks = {tuple(np.unique(order.indices(epoch, 0, 200) // 50)) for epoch in range(6)}
    assert len(first_blocks) == 6


def test_order_depends_on_seed_and_epoch_only() -> None:
    whole = EpochOrder(LENGTHS, seed=1, window_shards=2).indices(4, 0, 65)
    piecewise = EpochOrder(LENGTHS, seed=1, window_shards=2)
    pieces = [piecewise.indices(4, start, min(start + 9, 65)) for start in reversed(range(0, 65, 9))]
    assert np.array_equal(np.concatenate(pieces[::-1]), whole)
    assert not np.array_equal(EpochOrder(LENGTHS, seed=2, window_shards=2).indices(4, 0, 65), whole)


def test_normalize_matches_the_definition() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).contiguous()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images.double() / 255 - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    found = normalize(images)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert normalize(images, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="uint8"):
        normalize(found)


def test_need_for_workers() -> None:
    assert workers_needed(0.001, seconds_per_image=1 / 12_000) == 12
    assert workers_needed(0.001, seconds_per_image=0.01) == 1
    with pytest.raises(ValueError, match="positive"):
        workers_needed(0.001, seconds_per_image=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stage_of_other_sizes_has_the_same_samples_and_boxes(
    make_loader: Callable[..., TrainLoader], workers: int
) -> None:
    """Sides and micro-batches change on the way without new workers; what is cropped of whom stays."""
    shape_at = [BatchShape(8, 8)] * 2 + [BatchShape(16, 4)] * 2
    loader = make_loader(workers=workers, img_size=16, global_batch=8, micro_batch=4)
    staged = list(loader.batches(0, 4, shape_at=shape_at.__getitem__))
    plain = list(make_loader(workers=0, img_size=16, global_batch=8, micro_batch=4).batches(0, 4))
    assert [tuple(batch.images.shape) for batch in staged] == [(8, 3, 8, 8)] * 2 + [(4, 3, 16, 16)] * 4
    assert [tuple(batch.noise.shape) for batch in staged] == [(8, 1)] * 2 + [(4, 4)] * 4
    assert [key for batch in staged for key in batch.keys] == [key for batch in plain for key in batch.keys]
    for mine, theirs in zip(staged[2:], plain[4:], strict=True):
        assert mine.images.equal(theirs.images)
        assert mine.noise.equal(theirs.noise)
    small = torch.nn.functional.avg_pool2d(torch.cat([batch.images for batch in plain[:4]]).float(), 2)
    difference = torch.cat([batch.images for batch in staged[:2]]).float() - small
    assert difference.abs().mean() < 12


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_another_size_take_turns(shards: Path, tmp_path: Path, workers: int) -> None:
    """Keys, labels, crops and noise are those of one set of shards; only the pixels come from the other."""
    small = write_shards(tmp_path / "small", LENGTHS, size=(20, 15))
    options = {"img_size": 16, "num_patches": 4, "global_batch": 8, "micro_batch": 8, "seed": 3}
    options |= {"cache_dir": tmp_path / "cache", "window_shards": 3}
    loader = open_loader(shards, **options, workers=workers, other_sizes=[str(small)])
    names, lengths = loader.all_shards()
    assert [Path(name).parent for name in names] == [small] * 7 + [shards] * 7
    assert lengths == LENGTHS * 2
    shapes = [BatchShape(16, 8, -2), BatchShape(16, 8), BatchShape(16, 8, -2), BatchShape(16, 8, -1)]
    mixed = list(loader.batches(4, 8, shape_at=lambda step: shapes[step - 4]))
    alone = {
        folder: list(open_loader(folder, **options, workers=0).batches(4, 8)) for folder in (small, shards)
    }  # fmt: skip
    for number, batch in enumerate(mixed):
        wanted = alone[shards if number % 2 else small][number]
        assert batch.images.equal(wanted.images)
        other = alone[small if number % 2 else shards][number]
        assert not batch.images.equal(other.images)
        for same in (wanted, other):
            assert (batch.keys, batch.indices.tolist()) == (same.keys, same.indices.tolist())
            assert batch.noise.equal(same.noise)


def test_shards_of_other_samples_are_no_other_size(shards: Path, tmp_path: Path) -> None:
    options = {"img_size": 16, "num_patches": 4, "global_batch": 8, "micro_batch": 8, "cache_dir": tmp_path / "cache"}
    fewer, cut = write_shards(tmp_path / "fewer", [13, 7]), write_shards(tmp_path / "cut", [7, 13, 20, 0, 11, 9, 5])
    for folder, held in ((fewer, "hold 20 in 2 shards"), (cut, "hold 65 in 7 shards")):
        with pytest.raises(ShardError, match=f"{folder}.*{held}.*on 65 in 7, or cut otherwise"):
            open_loader(shards, **options, other_sizes=[str(folder)])
    swapped = write_shards(tmp_path / "swapped", LENGTHS, first=1)
    for rank, place in (
        (0, "sample 0 of .*train-0000.tar is s00001 with label 1, of .* s00000"),
        (1, "train-0001.tar"),
    ):
        with pytest.raises(ShardError, match=place):
            open_loader(
                shards, **{**options, "micro_batch": 4}, other_sizes=[str(swapped)], rank=rank, world_size=2
            )  # fmt: skip
