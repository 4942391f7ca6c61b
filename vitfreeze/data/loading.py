"""Shards -> batches, by worker processes, in an order that knows nothing of the processes.

Batch `m` of optimizer step `s` is a plain function of (seed, s, m): a request says which places of which epoch it
covers, any worker can serve it, and torch's DataLoader hands the answers out in the order of the requests. So resuming
is starting at another step, and ranks, workers and accumulation change who makes a batch but not what is in it.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitfreeze.config import DataConfig, RunConfig, check_argument
from vitfreeze.data.addresses import is_remote
from vitfreeze.data.augmentation import CenterCrop, RandomCrop, Transform
from vitfreeze.data.downloads import DownloadCache, default_cache_dir
from vitfreeze.data.epoch_report import EpochReport, SkippedSample, log_report, merge_over_ranks, merge_reports
from vitfreeze.data.errors import ShardError
from vitfreeze.data.order import EpochOrder, find_places
from vitfreeze.data.shards import ShardReader, check_same_samples, find_shards
from vitfreeze.data.worker import Answer, BatchMaker, BatchPlan, Request, Ring, return_as_is, start_worker
from vitfreeze.ranks import Ranks


class BatchShape(NamedTuple):
    """What the batches of a step are: the side of the crops in pixels, the images of a micro-batch, the shards.

    `shards` counts those that the loader was given, `other_sizes` first; -1 is the last.
    """

    img_size: int
    micro_batch: int
    shards: int = -1


ShapeAt = Callable[[int], BatchShape]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, on the CPU or where `TrainLoader.batches` was told to bring it.

    Attributes:
        images: (B, 3, H, W) uint8, contiguous; `normalize` them on the device.
        labels: (B,) int64 class indices, -1 where the shards have none.
        noise: (B, L) float32 in [0, 1), from which the model draws its mask; (B, 0) in evaluation.
        keys: the samples' keys.
        indices: (B,) int64, each sample's place in the concatenation of all shards.
        epoch: epoch the samples belong to, from 0.
        step: optimizer step, from 0; number of the batch in evaluation.
        wait_seconds: how long the caller waited for this batch.
        skipped: samples met on the way that could not be used.
        fallbacks: images that Pillow had to decode.
    """

    images: Tensor
    labels: Tensor
    noise: Tensor
    keys: Sequence[str]
    indices: Tensor
    epoch: int
    step: int
    wait_seconds: float
    skipped: Sequence[SkippedSample] = ()
    fallbacks: int = 0

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device; the copies are under way, and the host has not waited."""
        images, labels, noise = (x.to(device, non_blocking=True) for x in (self.images, self.labels, self.noise))
        return replace(self, images=images, labels=labels, noise=noise)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How shards are read, whatever for; defaults and ranges are those of the settings data.*.

    Attributes:
        workers: decoding processes; 0 decodes in the calling process.
        prefetch: batches that each worker keeps ready.
        num_classes: labels must exist and be smaller; None: labels are not looked at.
        max_bad_fraction: share of an epoch's samples that may be unusable; an error as soon as this rank alone meets
            more. Over several ranks, `merge_reports` decides.
        allow_pipe: allow 'pipe:COMMAND' as a shard, which runs a shell command; the user's command line alone decides.
        cache_dir: folder for fetched shards and for the shards' headers; None: the user's cache.
        cache_gigabytes: bound on the fetched shards.
    """

    workers: int = DataConfig.workers
    prefetch: int = DataConfig.prefetch
    num_classes: int | None = None
    max_bad_fraction: float = DataConfig.max_bad_fraction
    allow_pipe: bool = DataConfig.allow_pipe
    cache_dir: str | PathLike[str] | None = None
    cache_gigabytes: float = DataConfig.cache_gigabytes

    def __post_init__(self) -> None:
        for name in ("workers", "prefetch", "max_bad_fraction", "cache_gigabytes"):
            check_argument(f"data.{name}", getattr(self, name))


def bring_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a device, each taken and copied while the device still computes on the one before it.

    On a GPU the copies have a stream of their own, so that they wait for nothing and nothing waits for them. An error
    is raised in the place of the batch that it befell.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ready, error = None, None
    with contextlib.closing(batches):  # type: ignore[type-var]  # a generator
        while error is None:
            try:
                with torch.cuda.stream(stream):
                    coming = next(batches, None)
                    coming = coming and coming.to(device)
                    copied = stream.record_event() if stream is not None else None
            except ShardError as met:
                coming, error = None, met
            if ready is not None:
                yield _await_copies(*ready)
            if coming is None:
                break
            ready = coming, copied
    if error is not None:
        raise error


def _await_copies(batch: Batch, copied: torch.cuda.Event | None) -> Batch:
    """Let the stream that computes wait for a batch's copies; the host does not."""
    if copied is not None:
        stream = torch.cuda.current_stream(batch.images.device)
        stream.wait_event(copied)
        for tensor in (batch.images, batch.labels, batch.noise):
            tensor.record_stream(stream)
    return batch


class _Loader:
    """What the loaders for training and evaluation share: the shards, the workers and the account of an epoch."""

    _plan: BatchPlan

    def __init__(
        self,
        shards: str | PathLike[str] | Sequence[str],
        *,
        split: str,
        rank: int,
        world_size: int,
        options: ReadOptions | None,
        open_shards: int,
    ) -> None:
        options = options or ReadOptions()
        self.rank, self.world_size, self.options = rank, world_size, options
        self.pin_memory = torch.cuda.is_available()  # page-locked batches, for asynchronous copies
        # A fork copies the locks that threads of CUDA and NCCL hold at that instant, and may wait for them for ever.
        # Workers of a forkserver, the default from Python 3.14 on, would outlive a main process that is killed.
        self.start_method = "spawn" if torch.cuda.is_available() or sys.platform != "linux" else "fork"
        self.reader = _open_reader(shards, split=split, options=options, open_shards=open_shards)
        self.readers = [self.reader]
        self.shards = self.reader.shards
        self.lengths = [self.reader.length(shard) for shard in range(len(self.shards.names))]
        is_here = not is_remote(self.shards.names[0])  # or it would have to be fetched first
        if options.num_classes is not None and is_here:
            self.reader.check_labels(0, max_bad_fraction=options.max_bad_fraction)
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(self.lengths, dtype=np.int64))])
        self.num_samples = int(self.starts[-1])
        self._report: EpochReport | None = None  # of the epoch under way
        self._reports: list[EpochReport] = []
        self._work_seconds = self._work_images = 0.0

    def take_reports(self) -> list[EpochReport]:
        """Return the reports of the epochs that ended since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def _count(self, batch: Batch, *, epoch_images: int) -> None:
        """Add a batch to the report of its epoch.

        Raises:
            ShardError: more samples than `max_bad_fraction` of the epoch are unusable.
        """
        if self._report is not None and self._report.epoch != batch.epoch:
            self._end_epoch()
        report = EpochReport(
            epoch=batch.epoch, epoch_images=epoch_images, images=len(batch.images) // self._plan.crops_per_image,
            fallbacks=batch.fallbacks, skipped=batch.skipped,
        )  # fmt: skip
        known = [self._report] if self._report is not None else []
        try:
            self._report = merge_reports([*known, report], max_bad_fraction=self.options.max_bad_fraction)
        except ShardError as error:
            error.of_one_rank = True
            raise

    def _end_epoch(self) -> None:
        """Report the epoch that was under way; one that goes on in another call of `batches` is not over."""
        if self._report is not None:
            log_report(self._report)
            self._reports.append(self._report)
            self._report = None

    def workers_needed(self, seconds_per_image: float) -> int:
        """Return how many workers per rank keep up with a device, judged by the batches made so far.

        Args:
            seconds_per_image: time the device takes per image of a micro-batch, without waiting.

        Raises:
            ValueError: no batch was made yet, or the time is not positive.
        """
        if not self._work_images:
            raise ValueError("the need for workers is measured from batches, and none was made yet")
        return workers_needed(self._work_seconds / self._work_images, seconds_per_image=seconds_per_image)

    def _serve(self, requests: Iterable[Request], *, largest: int) -> Iterator[Batch]:
        """Yield the answers to requests of at most `largest` crops."""
        plan, workers, prefetch = self._plan, self.options.workers, self.options.prefetch
        ring = Ring(
            ahead=workers * prefetch,
            batch=largest,
            img_size=plan.transform.img_size,
            num_patches=plan.num_patches,
            shared=workers > 0,
        )
        loader: DataLoader = DataLoader(
            BatchMaker(plan, ring=ring, readers=self.readers, starts=self.starts),
            sampler=enumerate(requests),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            multiprocessing_context=self.start_method if workers else None,
            collate_fn=return_as_is,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # seeds the workers; without one, torch draws from the caller's
        )
        answers = iter(loader)
        try:
            while True:
                begin = time.perf_counter()
                answer = next(answers, None)
                if answer is None:
                    return
                if isinstance(answer, ShardError):
                    answer.of_one_rank = True
                    raise answer
                self._work_seconds += answer.work_seconds
                self._work_images += len(answer.keys)
                yield self._unload(ring, answer, begin)
        finally:
            del answers  # its end stops the workers, also on Ctrl-C and when the caller stops early
            for reader in self.readers:
                reader.close()

    def _unload(self, ring: Ring, answer: Answer, begin: float) -> Batch:
        """Copy an answer out of the ring, so that the batch may be kept as long as anyone likes."""
        held, held_noise = ring.view(answer.slot, count=len(answer.keys), img_size=answer.request.img_size)
        images = torch.empty(held.shape, dtype=torch.uint8, pin_memory=self.pin_memory)
        noise = torch.empty(held_noise.shape, pin_memory=self.pin_memory)
        return Batch(
            images=images.copy_(held),
            labels=torch.from_numpy(answer.labels).pin_memory() if self.pin_memory else torch.from_numpy(answer.labels),
            noise=noise.copy_(held_noise),
            keys=answer.keys,
            indices=torch.from_numpy(answer.indices),
            epoch=answer.request.epoch,
            step=answer.request.step,
            wait_seconds=time.perf_counter() - begin,
            skipped=answer.skipped,
            fallbacks=answer.fallbacks,
        )


def _open_reader(
    shards: str | PathLike[str] | Sequence[str], *, split: str, options: ReadOptions, open_shards: int
) -> ShardReader:
    folder = Path(options.cache_dir) if options.cache_dir else default_cache_dir()
    return ShardReader(
        find_shards(shards, split=split, allow_pipe=options.allow_pipe),
        downloads=DownloadCache(
            folder / "shards", max_bytes=options.cache_gigabytes * 1e9, allow_pipe=options.allow_pipe
        ),
        index_dir=folder / "index",
        num_classes=options.num_classes,
        open_shards=open_shards,
    )


class TrainLoader(_Loader):
    """Batches for training, in an order that depends on (seed, epoch) only.

    Every epoch shows every sample once, `crops_per_image` crops of each, less the remainder that fills no global
    batch. Global batch `s` of an epoch is places s*G..(s+1)*G of its crops; micro-batch `m` of rank `r` is places
    (m * world_size + r) * micro_batch onward of it.

    A sample that cannot be decoded is replaced by the next good one of its shard, with the augmentation and mask that
    the missing one would have had, so that batches keep their size and everyone else their place.

    Args:
        shards: a folder, a brace pattern, a URL, or a list of such; see `find_shards`.
        img_size: side of the images in pixels.
        num_patches: patches per image, L: that many numbers of noise are drawn for each crop.
        global_batch: crops per optimizer step over all ranks.
        micro_batch: crops per rank and forward pass.
        rank: number of this process.
        world_size: number of processes.
        seed: decides the order, the crops and the noise.
        crops_per_image: independent crops and masks taken from one decoded image. An epoch has that many times as
            many crops, and steps.
        crop_scale: least and greatest share of the image's area in a crop.
        transform: replaces the random crop, for fine-tuning; `img_size` and `crop_scale` are then its own.
        split: which split of a folder's `_info.json`.
        options: how the shards are read.
        other_sizes: shards of the very same samples, stored at other sizes, for steps whose `BatchShape` says so.
        window_shards: how many shards are shuffled together; see `EpochOrder`.

    Raises:
        ShardError: a shard is missing or unusable, or `other_sizes` hold other samples.
        ValueError: a micro-batch would part the crops of an image, or fewer samples than a global batch.
    """

    def __init__(
        self,
        shards: str | PathLike[str] | Sequence[str],
        *,
        img_size: int,
        num_patches: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = RunConfig.seed,
        crops_per_image: int = DataConfig.crops_per_image,
        crop_scale: tuple[float, float] = DataConfig.crop_scale,
        transform: Transform | None = None,
        split: str = "train",
        options: ReadOptions | None = None,
        other_sizes: Sequence[str | PathLike[str] | Sequence[str]] = (),
        window_shards: int = 16,
    ) -> None:
        check_argument("run.seed", seed)
        check_argument("data.crops_per_image", crops_per_image)
        self.global_batch, self.crops_per_image = global_batch, crops_per_image
        self.world_size = world_size
        self.accumulation(micro_batch)
        self.micro_batch = micro_batch
        open_shards = window_shards + 4
        super().__init__(
            shards, split=split, rank=rank, world_size=world_size, options=options, open_shards=open_shards
        )
        others = [
            _open_reader(names, split=split, options=self.options, open_shards=open_shards) for names in other_sizes
        ]
        for other in others:
            check_same_samples(other, self.reader, shards=range(rank, len(self.lengths), world_size))
        self.readers = [*others, self.reader]
        order = EpochOrder(self.lengths, seed=seed, window_shards=window_shards)
        self.steps_per_epoch = self.num_samples * crops_per_image // global_batch
        if not self.steps_per_epoch:
            raise ValueError(
                f"the shards hold {self.num_samples} samples, {self.num_samples * crops_per_image} crops with "
                f"crops_per_image={crops_per_image}: fewer than one global batch of {global_batch}"
            )
        self._plan = BatchPlan(
            order=order,
            transform=transform or RandomCrop(img_size=img_size, scale=crop_scale),
            seed=seed,
            num_patches=num_patches,
            crops_per_image=crops_per_image,
            replace_bad=True,
        )

    def all_shards(self) -> tuple[list[str], list[int]]:
        """Return the name and the number of samples of every shard, those of `other_sizes` first."""
        return [name for reader in self.readers for name in reader.shards.names], self.lengths * len(self.readers)

    def accumulation(self, micro_batch: int) -> int:
        """Return how many micro-batches of a size make this rank's share of a global batch.

        Raises:
            ValueError: a micro-batch would part the crops of an image.
        """
        if micro_batch % self.crops_per_image:
            raise ValueError(
                f"a micro-batch of {micro_batch} is not a multiple of crops_per_image={self.crops_per_image}, so the "
                "crops of one decoded image would part"
            )
        return self.global_batch // (micro_batch * self.world_size)

    def batches(
        self,
        start_step: int,
        total_steps: int,
        *,
        micro_batch: int | None = None,
        shape_at: ShapeAt | None = None,
        device: torch.device | None = None,
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches of steps start_step..total_steps, across epochs, by the same workers.

        Starting anywhere costs the same. Close the iterator (or let it go) to stop the workers.

        Args:
            start_step: first optimizer step, from 0.
            total_steps: the step to stop before.
            micro_batch: another size of micro-batch than the loader's, for the same global batches.
            shape_at: returns what the batches of a step are, instead of one shape for all. Workers know it as far ahead
                as they prefetch, so that nothing waits at a change.
            device: bring the batches there, one ahead of the one that is asked for; None: leave them on the CPU.

        Raises:
            ShardError: a shard is unusable, or more samples than `max_bad_fraction` are.
            ValueError: the steps are not in order, or the micro-batch does not divide.
        """
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"steps {start_step} to {total_steps} are not a stretch of a run")
        side = self._plan.transform.img_size
        largest = micro_batch or self.micro_batch
        self.accumulation(largest)
        if shape_at is not None:
            shapes = {shape_at(step) for step in range(start_step, total_steps)}
            largest = max((-(-shape.micro_batch * shape.img_size**2 // side**2) for shape in shapes), default=largest)
        requests = self._requests(start_step, total_steps, shape_at or (lambda step: BatchShape(side, largest)))
        images = self.steps_per_epoch * self.global_batch // self.crops_per_image
        batches = self._serve(requests, largest=largest)
        for batch in batches if device is None else bring_ahead(batches, device):
            self._count(batch, epoch_images=images)
            yield batch
        self._end_epoch()

    def _requests(self, start_step: int, total_steps: int, shape_at: ShapeAt) -> Iterator[Request]:
        for step in range(start_step, total_steps):
            img_size, micro_batch, shards = shape_at(step)
            self.accumulation(micro_batch)
            for epoch, places in find_places(
                step, steps_per_epoch=self.steps_per_epoch, global_batch=self.global_batch, micro_batch=micro_batch,
                rank=self.rank, world_size=self.world_size,
            ):  # fmt: skip
                yield Request(
                    epoch=epoch, step=step, start=places.start, stop=places.stop, img_size=img_size, shards=shards
                )  # fmt: skip


class EvalLoader(_Loader):
    """Batches for evaluation: every sample exactly once over all ranks, in the order of the shards.

    Rank r reads a contiguous share; shares differ by at most one sample, so ranks may differ by one batch. Nothing is
    padded or repeated: the last batch is smaller, and a sample that cannot be decoded is left out and reported.

    Args:
        shards: as for `TrainLoader`.
        img_size: side of the images in pixels.
        batch_size: images per batch.
        rank: number of this process.
        world_size: number of processes.
        split, options: as for `TrainLoader`.
    """

    def __init__(
        self,
        shards: str | PathLike[str] | Sequence[str],
        *,
        img_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        split: str = "validation",
        options: ReadOptions | None = None,
    ) -> None:
        super().__init__(shards, split=split, rank=rank, world_size=world_size, options=options, open_shards=8)
        self.batch_size = batch_size
        self._plan = BatchPlan(transform=CenterCrop(img_size=img_size))

    @property
    def share(self) -> range:
        """Indices of the samples that this rank reads."""
        return range(
            self.num_samples * self.rank // self.world_size, self.num_samples * (self.rank + 1) // self.world_size
        )

    def __len__(self) -> int:
        """Number of batches on this rank."""
        return -(-len(self.share) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self._report = EpochReport(epoch=0, epoch_images=self.num_samples, images=0, fallbacks=0, skipped=())
        requests = (
            Request(
                epoch=0,
                step=step,
                start=start,
                stop=min(start + self.batch_size, self.share.stop),
                img_size=self._plan.transform.img_size,
            )
            for step, start in enumerate(range(self.share.start, self.share.stop, self.batch_size))
        )
        try:
            for batch in self._serve(requests, largest=self.batch_size):
                self._count(batch, epoch_images=self.num_samples)
                if len(batch.images):
                    yield batch
        except GeneratorExit:  # the caller has seen enough
            self._end_epoch()
            raise
        self._end_epoch()

    def tell_unusable(self, ranks: Ranks) -> None:
        """Add up what the ranks could not use, and say it where others met more; all ranks call this after reading.

        Raises:
            ShardError: together it is more than `max_bad_fraction`.
        """
        for mine in self.take_reports():
            whole = merge_over_ranks(mine, ranks=ranks, max_bad_fraction=self.options.max_bad_fraction)
            if ranks.rank == 0 and len(whole.skipped) > len(mine.skipped):
                log_report(whole)


def describe_lost_worker(error: RuntimeError) -> str:
    """Return a sentence if the error is torch's that a decoding process is gone, which it raises at any place; else ''.

    The system kills processes when memory runs out, those of the data first, because there are many of them.
    """
    said = " ".join(str(error).split())
    if not said.startswith("DataLoader worker"):
        return ""
    return (
        f"a decoding process is gone ({said.rstrip('.')}); did memory run out? The same command goes on from the "
        "newest checkpoint; fewer data.workers need less"
    )


def workers_needed(work_seconds_per_image: float, *, seconds_per_image: float) -> int:
    """Return how many workers make images as fast as a device takes them.

    Args:
        work_seconds_per_image: time one worker takes per image.
        seconds_per_image: time the device takes per image.

    Raises:
        ValueError: a time is not positive.
    """
    if work_seconds_per_image <= 0 or seconds_per_image <= 0:
        raise ValueError(f"times per image must be positive, not {work_seconds_per_image:g} and {seconds_per_image:g}")
    return math.ceil(work_seconds_per_image / seconds_per_image)
