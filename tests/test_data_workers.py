"""Worker processes end when they should, and quietly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_shards import open_loader, write_shards

from vitfreeze.data import Batch, BatchShape, TrainLoader, loading
from vitfreeze.data.errors import ShardError
from vitfreeze.data.loading import bring_ahead

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import sys
from vitfreeze.data import ReadOptions, TrainLoader
loader = TrainLoader(sys.argv[1], img_size=16, num_patches=4, global_batch=4, micro_batch=4,
                     options=ReadOptions(workers=2, cache_dir=sys.argv[2]))
try:
    for batch in loader.batches(0, 10**9):
        if batch.step == 20:
            print("running", flush=True)
except KeyboardInterrupt:
    print("interrupted at a step of our own choosing", flush=True)
"""


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", [30, 30])


def make_loader(shards: Path, **settings: object) -> TrainLoader:
    defaults = {"img_size": 16, "num_patches": 4, "global_batch": 4, "micro_batch": 4, "workers": 2}
    return open_loader(shards, **(defaults | {"cache_dir": shards.parent / "cache"} | settings))


@pytest.mark.distributed
def test_nothing_is_begun_anew_where_the_images_change(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One ring and the same workers serve all sizes, and what the next stage begins with is under way before it."""
    sizes = [BatchShape(8, 4)] * 6 + [BatchShape(16, 2)] * 4 + [BatchShape(16, 4)] * 4
    rings, asked = list[dict[str, int]](), Counter[int]()

    class CountedRing(loading.Ring):
        def __init__(self, **options: Any) -> None:
            rings.append(options)
            super().__init__(**options)

    def shape_at(step: int) -> BatchShape:
        asked[step] += 1  # once for the size of the ring, and again when its batch is ordered
        return sizes[step]

    monkeypatch.setattr(loading, "Ring", CountedRing)
    seen, workers = [], set()
    for batch in make_loader(shards, workers=1, prefetch=3).batches(0, len(sizes), shape_at=shape_at):
        seen.append((batch.step, batch.images.shape[-1], len(batch.images)))
        workers |= {child.pid for child in multiprocessing.active_children()}
        assert asked[min(batch.step + 1, len(sizes) - 1)] == 2, "the next step's batches are ordered"
    assert (len(rings), len(workers)) == (1, 1)
    assert seen == [(step, *size[:2]) for step, size in enumerate(sizes) for _ in range(4 // size[1])]


@pytest.mark.distributed
def test_workers_end_with_their_main_process(shards: Path, tmp_path: Path) -> None:
    """After Ctrl-C, which a terminal sends to everyone but only the main process heeds; and when that one is killed."""
    interrupted, killed = (
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(shards), str(tmp_path / "cache")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    )
    workers = []
    for process in (interrupted, killed):
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        workers += psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 4

    os.killpg(interrupted.pid, signal.SIGINT)
    killed.kill()
    out, errors = interrupted.communicate(timeout=60)
    assert out == "interrupted at a step of our own choosing\n"
    assert "Traceback" not in errors
    assert interrupted.returncode == 0
    killed.communicate(timeout=60)
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_stopping_early_ends_the_workers(shards: Path) -> None:
    batches = make_loader(shards).batches(0, 1000)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


def test_workers_stay_across_epochs(shards: Path) -> None:
    loader = make_loader(shards)
    seen = set()
    for batch in loader.batches(0, 3 * loader.steps_per_epoch):
        seen.add(tuple(sorted(child.pid or 0 for child in multiprocessing.active_children())))
        last = batch
    assert last.epoch == 2
    assert len({pids for pids in seen if len(pids) == 2}) == 1


def test_batches_may_be_kept(shards: Path) -> None:
    """The ring is used again many times over; what was handed out must not change."""
    loader = make_loader(shards, prefetch=1)
    kept = [(batch, batch.images.clone(), batch.noise.clone()) for batch in loader.batches(0, 40)]
    for batch, images, noise in kept:
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.noise, noise)
    alone = list(make_loader(shards, workers=0).batches(0, 40))
    for (batch, _, _), expected in zip(kept, alone, strict=True):
        assert torch.equal(batch.images, expected.images)


@pytest.mark.parametrize("slow", ["reader", "worker"])
def test_ring_never_overtakes(shards: Path, slow: str) -> None:
    """Whoever waits for whom, a slot is filled again only after its batch was copied out."""
    expected = [batch.images for batch in make_loader(shards, workers=0).batches(0, 30)]
    settings = {"workers": 3 if slow == "reader" else 1, "prefetch": 2}
    for batch, images in zip(make_loader(shards, **settings).batches(0, 30), expected, strict=True):
        if slow == "reader":
            time.sleep(0.01)
        assert torch.equal(batch.images, images)


def test_batches_are_brought_ahead_without_change(shards: Path) -> None:
    """Also across epochs, whose reports come when their last batch has been handed out, not when it was fetched."""
    loader, device = make_loader(shards, workers=0), torch.device("cpu")
    expected = list(make_loader(shards, workers=0).batches(3, 40))
    reported = []
    for number, batch in enumerate(loader.batches(3, 40, device=device)):
        assert batch.keys == expected[number].keys
        assert torch.equal(batch.images, expected[number].images)
        assert torch.equal(batch.noise, expected[number].noise)
        reported += [(batch.step, report.epoch) for report in loader.take_reports()]
    assert number == len(expected) - 1
    assert reported == [(15, 0), (30, 1)]


def test_an_error_waits_for_its_turn() -> None:
    def serve() -> Iterator[Batch]:
        for step in range(2):
            empty = torch.zeros(1)
            yield Batch(
                images=empty, labels=empty, noise=empty, keys=(), indices=empty, epoch=0, step=step, wait_seconds=0
            )
        raise ShardError("the third is bad")

    taken = bring_ahead(serve(), torch.device("cpu"))
    assert [next(taken).step, next(taken).step] == [0, 1]
    with pytest.raises(ShardError, match="the third is bad"):
        next(taken)


@pytest.mark.distributed
def test_workers_that_are_not_forked_make_the_same_batches(shards: Path) -> None:
    """As on a GPU, where a fork after NCCL has started is not safe."""
    expected = [batch.images for batch in make_loader(shards, workers=0).batches(0, 20)]
    loader = make_loader(shards, workers=2)
    loader.start_method = "spawn"
    for batch, images in zip(loader.batches(0, 20), expected, strict=True):
        assert torch.equal(batch.images, images)
