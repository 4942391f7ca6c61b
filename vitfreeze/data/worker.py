"""What a worker process does: decode and augment the samples that a request names, into a slot of shared memory.

Pixels travel through a ring of shared memory that lives as long as the workers. Handing each batch over in memory of
its own, as DataLoader does by itself, costs a page fault per 4 KiB in the worker and another in the main process.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitfreeze.data.addresses import cut_query
from vitfreeze.data.augmentation import Transform
from vitfreeze.data.decoding import DecodedImage, decode_image
from vitfreeze.data.epoch_report import SkippedSample
from vitfreeze.data.errors import BadSampleError, ShardError
from vitfreeze.data.order import EpochOrder, SampleRandom
from vitfreeze.data.shards import Sample, ShardReader


@dataclass(frozen=True, kw_only=True)
class Request:
    """Crops start..stop of an epoch, of a side: crop c belongs to the image at place c // crops_per_image.

    `shards` is the number of the reader, one for each size in which the images are stored; -1 is the last.
    """

    epoch: int
    step: int
    start: int
    stop: int
    img_size: int
    shards: int = -1


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a worker tells of a batch; the pixels and the noise lie in the slot of the ring that it was told to fill."""

    request: Request
    slot: int
    keys: list[str]
    labels: np.ndarray
    indices: np.ndarray
    skipped: list[SkippedSample]
    fallbacks: int
    work_seconds: float


class Ring:
    """Memory that workers fill and the main process empties, one slot per batch under way.

    DataLoader sends out the request `ahead` places further on before it hands over an answer, and the next one only
    when it is asked again; by then the answer has been copied. So ahead + 1 slots, used in turn, never collide.
    """

    def __init__(self, *, ahead: int, batch: int, img_size: int, num_patches: int, shared: bool) -> None:
        self.slots = ahead + 1
        self._img_size, self._num_patches = img_size, num_patches
        self.images = torch.empty(self.slots, batch * 3 * img_size**2, dtype=torch.uint8)
        self.noise = torch.empty(self.slots, batch * num_patches)
        if shared:
            self.images.share_memory_()
            self.noise.share_memory_()

    def view(self, slot: int, *, count: int, img_size: int) -> tuple[Tensor, Tensor]:
        """Return a slot as so many images of a side, (B, 3, H, W), and the noise of their patches, (B, L)."""
        patches = self._num_patches * img_size**2 // self._img_size**2
        images = self.images[slot, : count * 3 * img_size**2].view(count, 3, img_size, img_size)
        return images, self.noise[slot, : count * patches].view(count, patches)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How batches are made of samples; the defaults are evaluation's."""

    transform: Transform
    order: EpochOrder | None = None  # None: in the order of the shards
    seed: int = 0
    num_patches: int = 0
    crops_per_image: int = 1
    replace_bad: bool = False


class BatchMaker(Dataset):
    """Answers requests, each with the slot to fill. Every worker process has a copy."""

    def __init__(self, plan: BatchPlan, *, ring: Ring, readers: Sequence[ShardReader], starts: np.ndarray) -> None:
        self.plan = plan
        self.ring = ring
        self.readers = readers
        self.starts = starts
        self._random = SampleRandom(plan.seed)

    def __getitem__(self, numbered: tuple[int, Request]) -> Answer | ShardError:
        try:
            return self._answer(*numbered)
        except ShardError as error:
            return error  # torch would wrap its one sentence into the worker's traceback

    def _answer(self, number: int, request: Request) -> Answer:
        begin = time.perf_counter()
        slot = number % self.ring.slots
        images, noise_BL = self.ring.view(slot, count=request.stop - request.start, img_size=request.img_size)
        noise = noise_BL.numpy()
        reader = self.readers[request.shards]
        wanted = self._wanted(request, reader)
        skipped, keys, used, row, fallbacks = list[SkippedSample](), list[str](), list[tuple[int, int]](), 0, 0
        for index, shard, place in wanted:
            found = self._decode(reader, index, shard, place, skipped)
            if found is None:
                continue
            sample, used_index, image = found
            fallbacks += image.fell_back
            for crop in range(self.plan.crops_per_image):
                self._random.seek(epoch=request.epoch, sample=index, crop=crop)
                self.plan.transform.apply(image.pixels, self._random, images[row])
                self._random.fill(noise[row])
                row += 1
            keys += [sample.key] * self.plan.crops_per_image
            used += [(sample.label, used_index)] * self.plan.crops_per_image
        labels, indices = np.array(used, dtype=np.int64).reshape(-1, 2).T
        return Answer(
            request=request,
            slot=slot,
            keys=keys,
            labels=labels,
            indices=indices,
            skipped=skipped,
            fallbacks=fallbacks,
            work_seconds=time.perf_counter() - begin,
        )

    def _wanted(self, request: Request, reader: ShardReader) -> list[tuple[int, int, int]]:
        """Return (index, shard, place in the shard) of the request's samples, and let the system begin to read them."""
        first, last = request.start // self.plan.crops_per_image, request.stop // self.plan.crops_per_image
        if self.plan.order is None:
            indices = np.arange(first, last, dtype=np.int64)
        else:
            indices = self.plan.order.indices(request.epoch, first, last)
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        wanted = list(zip(indices.tolist(), shards.tolist(), (indices - self.starts[shards]).tolist(), strict=True))
        for _, shard, place in wanted:
            try:
                reader.expect(shard, reader.sample(shard, place))
            except BadSampleError:
                continue  # met again, and counted, when its turn comes
        return wanted

    def _decode(
        self, reader: ShardReader, index: int, shard: int, place: int, skipped: list[SkippedSample]
    ) -> tuple[Sample, int, DecodedImage] | None:
        """Decode a sample, or the next good one of its shard in its stead; None where nothing shall replace it.

        Raises:
            ShardError: no sample of the shard is usable.
        """
        length = reader.length(shard)
        for offset in range(length if self.plan.replace_bad else 1):
            there = (place + offset) % length
            try:
                sample = reader.sample(shard, there)
                return sample, index - place + there, decode_image(reader.read(shard, sample))
            except BadSampleError as error:
                reason = str(error)
                if not offset:  # those passed over in search of a substitute are counted where it is their turn
                    name = cut_query(reader.shards.names[shard])
                    skipped.append(SkippedSample(index=index, shard=name, key=reader.key(shard, place), reason=reason))
        if not self.plan.replace_bad:
            return None
        raise ShardError(f"none of the {length} samples of shard {name} is usable (the last: {reason})")


def start_worker(_: int) -> None:
    """Prepare a worker: signals are the main process's to handle, and one image at a time needs one thread.

    Terminals and schedulers signal whole process groups; the main process needs its workers until it has saved.
    """
    signal.set_wakeup_fd(-1)  # inherited, it would pass this worker's signals off as the main process's own
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def return_as_is(parts: Any) -> Any:
    """Collate nothing: a worker's answer is a batch already."""
    return parts
