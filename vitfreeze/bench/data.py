"""Images per second of the input pipeline: reading, decoding, the whole, and torchvision on the same images.

Speeds of whole pipelines are given per second of processor time, over the workers and the main process together, so
that they hold for one core however small the machine is. Starting the workers is left out: a run of one batch is
subtracted. The two pipelines run in turn, several rounds, and the medians are compared.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from vitfreeze.data import BadSampleError, EpochOrder, RandomCrop, ReadOptions, TrainLoader, workers_needed
from vitfreeze.data.decoding import decode_image
from vitfreeze.data.order import SampleRandom
from vitfreeze.data.shards import Sample
from vitfreeze.text import format_table

# About what one H100 takes of LocalMIM on ViT-B, by its counted operations.
FAST_DEVICE_IMAGES_PER_SECOND = 12_000
_NUM_PATCHES = 196


@dataclass(frozen=True, kw_only=True)
class PipelineSpeed:
    """One pipeline, medians over the rounds.

    Attributes:
        images_per_core_second: images per second of processor time of all processes.
        images_per_worker_second: images per second and worker by the clock; on a machine with fewer free cores than
            workers it says more of the machine than of the pipeline.
    """

    images_per_core_second: float
    images_per_worker_second: float


@dataclass(frozen=True, kw_only=True)
class DataBenchmark:
    """What the input pipeline reaches on this machine, in images per second.

    Attributes:
        images: photographs measured.
        kilobytes_per_image: mean size of their files.
        workers: worker processes of the whole pipelines.
        reading: reading files out of shards, on one core.
        decoding: decoding them, on one core.
        decoding_and_cropping: with crop, resizing and mirroring, on one core.
        pipeline: shards to batches.
        torchvision: the same photographs and augmentation from a folder, by ImageFolder and DataLoader.
        speedup: pipeline over torchvision, per core; median of the rounds' ratios.
        fallbacks: photographs that Pillow had to decode.
        unusable: samples that could not be decoded.
        device_images_per_second: what the device is said to take.
        workers_needed: workers that feed it.
    """

    images: int
    kilobytes_per_image: float
    workers: int
    reading: float
    decoding: float
    decoding_and_cropping: float
    pipeline: PipelineSpeed
    torchvision: PipelineSpeed
    speedup: float
    fallbacks: int
    unusable: int
    device_images_per_second: float
    workers_needed: int


def run_data_benchmark(
    shards: str | PathLike[str] | Sequence[str],
    *,
    images: int = 2000,
    img_size: int = 224,
    workers: int = 1,
    rounds: int = 3,
    batch_size: int = 64,
    device_images_per_second: float = FAST_DEVICE_IMAGES_PER_SECOND,
    split: str = "train",
    cache_dir: str | PathLike[str] | None = None,
    allow_pipe: bool = False,
) -> DataBenchmark:
    """Measure the input pipeline on some shards.

    Args:
        shards: as for `TrainLoader`.
        images: photographs to measure on; fewer where the shards hold fewer.
        img_size: side of the crops in pixels.
        workers: worker processes of each pipeline, at least 1.
        rounds: how often each pipeline runs.
        batch_size: images per batch.
        device_images_per_second: what the device takes, for the number of workers it needs.
        split: which split of a folder's `_info.json`.
        cache_dir: as for `TrainLoader`.
        allow_pipe: whether the user's command line allows shards that are shell commands.

    Raises:
        ValueError: a number is not positive, or the shards hold fewer images than a batch.
    """
    for name, value in {"images": images, "workers": workers, "rounds": rounds, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; a measurement needs at least 1")
    if device_images_per_second <= 0:
        raise ValueError(f"a device that takes {device_images_per_second:g} images per second needs no workers")
    settings = {"img_size": img_size, "batch_size": batch_size, "workers": workers}
    loader = TrainLoader(
        shards,
        img_size=img_size,
        num_patches=_NUM_PATCHES,
        global_batch=batch_size,
        micro_batch=batch_size,
        split=split,
        options=ReadOptions(workers=workers, max_bad_fraction=1, cache_dir=cache_dir, allow_pipe=allow_pipe),
    )
    steps = max(2, min(images // batch_size, loader.steps_per_epoch))
    if loader.steps_per_epoch < 2:
        raise ValueError(f"the shards hold {loader.num_samples} samples; measuring takes two batches of {batch_size}")
    files, labels, reading, unusable = _read_files(loader, steps * batch_size)
    decoding, fallbacks = _time_decoding(files)
    ours, theirs = list[PipelineSpeed](), list[PipelineSpeed]()
    with tempfile.TemporaryDirectory(prefix="vitfreeze-bench-") as name:
        _write_folder(files, labels, Path(name))
        for _ in range(rounds):
            ours.append(_time_pipeline(lambda limit: _read_with_loader(loader, limit), steps, workers))
            theirs.append(
                _time_pipeline(lambda limit: _read_with_torchvision(Path(name), limit, **settings), steps, workers)
            )
    pipeline = _median(ours)
    return DataBenchmark(
        images=len(files),
        kilobytes_per_image=sum(map(len, files)) / len(files) / 1000,
        workers=workers,
        reading=reading,
        decoding=decoding,
        decoding_and_cropping=_time_cropping(files, img_size),
        pipeline=pipeline,
        torchvision=_median(theirs),
        speedup=statistics.median(
            one.images_per_core_second / other.images_per_core_second for one, other in zip(ours, theirs, strict=True)
        ),
        fallbacks=fallbacks,
        unusable=unusable,
        device_images_per_second=device_images_per_second,
        workers_needed=workers_needed(
            1 / pipeline.images_per_core_second, seconds_per_image=1 / device_images_per_second
        ),
    )


def format_data_benchmark(result: DataBenchmark) -> str:
    """Return the result as a table."""
    rows = [["images/s", "per core", "per worker by the clock"]]
    for name, speed in (
        ("reading", result.reading),
        ("decoding", result.decoding),
        ("decoding and cropping", result.decoding_and_cropping),
    ):
        rows.append([name, f"{speed:,.0f}", ""])
    for name, whole in (("whole pipeline", result.pipeline), ("torchvision", result.torchvision)):
        rows.append([name, f"{whole.images_per_core_second:,.0f}", f"{whole.images_per_worker_second:,.0f}"])
    return (
        f"{result.images} images of {result.kilobytes_per_image:.0f} kB, {result.workers} worker(s)\n"
        f"{format_table(rows)}\n{result.speedup:.2f} times torchvision's images per core; Pillow decoded "
        f"{result.fallbacks}, {result.unusable} were unusable\na device that takes "
        f"{result.device_images_per_second:,.0f} images/s needs {result.workers_needed} workers"
    )


def _read_files(loader: TrainLoader, count: int) -> tuple[list[bytes], list[int], float, int]:
    """Read the files of the first epoch's beginning; return those that decode, their labels, images/s, and the rest."""
    order = EpochOrder(loader.lengths, seed=0)
    indices = order.indices(0, 0, count)
    shards = np.searchsorted(loader.starts, indices, side="right") - 1
    places = list(zip(shards.tolist(), (indices - loader.starts[shards]).tolist(), strict=True))
    found: list[tuple[int, Sample]] = []
    for shard, place in places:  # reads the headers, where they are not stored; that is no part of the reading
        with contextlib.suppress(BadSampleError):
            found.append((shard, loader.reader.sample(shard, place)))
    files, labels = list[bytes](), list[int]()
    begin = time.process_time()
    contents = [loader.reader.read(shard, sample) for shard, sample in found]
    seconds = time.process_time() - begin
    for data, (_, sample) in zip(contents, found, strict=True):
        with contextlib.suppress(BadSampleError):
            decode_image(data)
            files.append(data)
            labels.append(max(0, sample.label))
    loader.reader.close()
    if not files:
        raise ValueError(f"none of the first {count} samples can be decoded, so there is nothing to measure")
    return files, labels, len(contents) / seconds, count - len(files)


def _time_decoding(files: Sequence[bytes]) -> tuple[float, int]:
    """Return images/s of decoding on one core, and how many Pillow decoded."""
    begin = time.process_time()
    fallbacks = sum(decode_image(data).fell_back for data in files)
    return len(files) / (time.process_time() - begin), fallbacks


def _time_cropping(files: Sequence[bytes], img_size: int) -> float:
    """Return images/s of decoding and cropping on one core."""
    crop, random = RandomCrop(img_size=img_size), SampleRandom(0)
    out = torch.empty(3, img_size, img_size, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        begin = time.process_time()
        for number, data in enumerate(files):
            random.seek(epoch=0, sample=number, crop=0)
            crop.apply(decode_image(data).pixels, random, out)
        return len(files) / (time.process_time() - begin)
    finally:
        torch.set_num_threads(threads)


def _write_folder(files: Sequence[bytes], labels: Sequence[int], folder: Path) -> None:
    """Lay files out as ImageFolder wants them, under names of our own."""
    for number, (data, label) in enumerate(zip(files, labels, strict=True)):
        (folder / f"{label:08d}").mkdir(exist_ok=True)
        (folder / f"{label:08d}" / f"{number:08d}.jpg").write_bytes(data)


def _read_with_loader(loader: TrainLoader, limit: int) -> int:
    """Read `limit` batches; return the number of images."""
    return sum(len(batch.images) for batch in loader.batches(0, limit))


def _read_with_torchvision(folder: Path, limit: int, *, img_size: int, batch_size: int, workers: int) -> int:
    """Read `limit` batches by torchvision, with the same augmentation, as uint8; return the number of images."""
    augmentation = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                img_size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    dataset = ImageFolder(str(folder), augmentation)
    chosen = Subset(dataset, torch.randperm(len(dataset), generator=torch.Generator())[: limit * batch_size].tolist())
    loader = DataLoader(chosen, batch_size=batch_size, num_workers=workers, prefetch_factor=4)
    return sum(len(images) for images, _ in loader)


def _time_pipeline(read: Callable[[int], int], steps: int, workers: int) -> PipelineSpeed:
    """Compare reading `steps` batches with reading one; processor time includes that of the workers, who then end."""
    spent = []
    for limit in (1, steps):
        begin, begin_core = time.perf_counter(), _core_seconds()
        count = read(limit)
        spent.append((count, time.perf_counter() - begin, _core_seconds() - begin_core))
    images, seconds, core_seconds = (long - short for short, long in zip(*spent, strict=True))
    return PipelineSpeed(
        images_per_core_second=images / core_seconds, images_per_worker_second=images / seconds / workers
    )


def _core_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _median(speeds: Sequence[PipelineSpeed]) -> PipelineSpeed:
    return PipelineSpeed(
        images_per_core_second=statistics.median(speed.images_per_core_second for speed in speeds),
        images_per_worker_second=statistics.median(speed.images_per_worker_second for speed in speeds),
    )
