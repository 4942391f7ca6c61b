"""Cells of the step: its time and memory, launches, busy share and waits, on random images and on shards; and HOG's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vitfreeze.bench.gpu.cells import FROZEN_LAYERS, NO_GPU, Cell, Stepper, Trial, Unmeasured, open_stepper, tell
from vitfreeze.bench.timing import mark, time_call
from vitfreeze.data import build_train_loader, normalize, tabulate
from vitfreeze.engine import join_ranks, supports
from vitfreeze.model import hog_targets
from vitfreeze.model.targets import agree, find_obstacle

PROFILED_STEPS = 2


def measure_steps(trial: Trial, *, size: str, compile: bool) -> Iterator[Cell]:
    """Yield a cell for every frozen length; the first step of each, which may compile, is told apart."""
    config = trial.configure(size=size, compile=compile)
    depth = config.model.resolve().depth
    with open_stepper(config, images=trial.images) as stepper:
        for k in sorted({min(k, depth) for k in FROZEN_LAYERS}):
            stepper.engine.freeze(k, step=k)
            yield _tell_step(stepper, trial, name=f"{size}, {k} frozen{', compiled' if compile else ''}")


def measure_ds_config(trial: Trial, *, ds_config: str) -> Iterator[Cell]:
    """Yield a cell for another precision or stage, with nothing frozen."""
    name, precision = f"{trial.models[0]}, 0 frozen, {ds_config}", ds_config.partition("_")[2]
    if not supports(precision):
        yield tell("step", name, step_ms=Unmeasured(f"DeepSpeed takes no {precision} on this device"))
        return
    with open_stepper(trial.configure(ds_config=ds_config), images=trial.images) as stepper:
        yield _tell_step(stepper, trial, name=name)


def _tell_step(stepper: Stepper, trial: Trial, *, name: str) -> Cell:
    first, peak = stepper.time_run(), stepper.peak_bytes()
    seconds = stepper.time_steps(trial.rounds)
    return tell(
        "step",
        name,
        first_step_ms=1e3 * first,
        step_ms=1e3 * seconds,
        images_per_second=trial.images / seconds,
        peak_bytes=peak,
        **profile_steps(stepper.take, device=stepper.engine.device),
    )


def profile_steps(take: Callable[[], object], *, device: torch.device) -> dict[str, float | Unmeasured]:
    """Return what `summarize_events` makes of some steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            take()
        mark(device, time.perf_counter)  # waits once, which is no part of the steps
    return summarize_events(profiler.events() or (), steps=PROFILED_STEPS)


def summarize_events(events: Iterable[Any], *, steps: int) -> dict[str, float | Unmeasured]:
    """Return launches (kernels, copies and fillings) and waits of the host a step, and the GPU's busy share.

    Busy is the time in which at least one of them runs, of the time from the first to the last.
    """
    events = list(events)
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type == DeviceType.CUDA)
    if not spans:
        return dict.fromkeys(("launches", "busy_share", "waits"), Unmeasured("the profiler saw no GPU"))
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    waits = sum(e.device_type == DeviceType.CPU and "Synchronize" in e.name for e in events) - 1
    return {
        "launches": len(spans) / steps,
        "busy_share": busy / (reached - spans[0][0]),
        "waits": waits / steps,
    }


def measure_shards(trial: Trial) -> Iterator[Cell]:
    """Yield a cell for steps on the recipe's shards, with the share of the time in which the step waited for them."""
    name = f"{trial.models[0]}, 0 frozen, data.train"
    if not trial.config.data.train:
        reason = Unmeasured("data.train is not set")
        yield tell("shards", name, step_ms=reason, images_per_second=reason, data_wait_share=reason)
        return
    config = trial.configure()
    loader = build_train_loader(config)
    with open_stepper(config, images=trial.images) as stepper:
        device, waited = stepper.engine.device, 0.0
        batches = loader.batches(0, 1 + trial.rounds, device=device)
        for number, batch in enumerate(batches):
            if number == 1:  # the first batch waits for workers, its step fills caches
                start, waited = mark(device, time.perf_counter), 0.0
            waited += batch.wait_seconds
            stepper.take(batch.images, noise=batch.noise)
        seconds = mark(device, time.perf_counter) - start
    yield tell(
        "shards",
        name,
        step_ms=1e3 * seconds / trial.rounds,
        images_per_second=trial.images * trial.rounds / seconds,
        data_wait_share=waited / seconds,
    )


def measure_hog(trial: Trial) -> Iterator[Cell]:
    """Yield a cell for HOG's kernel beside the plain version, from bytes to the targets of all scales."""
    from vitfreeze.training.build import build_model

    config, device = trial.configure(), join_ranks().device
    model, side = build_model(config), config.model.img_size
    given = torch.randint(0, 256, (trial.images, 3, side, side), dtype=torch.uint8, device=device)
    table = tabulate(device, config.data.colours)
    bias = None if model.hog_bias is None else model.hog_bias.to(device)
    options: dict[str, Any] = {"cell_sizes": model.cell_sizes, "nbins": model.hog_nbins, "bias": bias}

    def plain() -> list[torch.Tensor]:
        return hog_targets(normalize(given, colours=config.data.colours), **options)

    expected = plain()
    milliseconds = partial(_time_ms, device=device, rounds=trial.rounds)
    obstacle = find_obstacle(model.cell_sizes, device=device) if device.type == "cuda" else NO_GPU
    if obstacle is not None:
        missing = Unmeasured(obstacle)
        yield tell("hog", "kernel", plain_ms=milliseconds(plain), kernel_ms=missing, ratio=missing, agrees=missing)
        return
    from vitfreeze.model.hog_kernel import hog_by_kernel

    kernel = partial(hog_by_kernel, given, table=table, **options)
    agrees = agree(kernel(), expected)
    plain_ms, kernel_ms = milliseconds(plain), milliseconds(kernel)
    yield tell("hog", "kernel", plain_ms=plain_ms, kernel_ms=kernel_ms, ratio=kernel_ms / plain_ms, agrees=agrees)


def _time_ms(call: Callable[[], object], *, device: torch.device, rounds: int) -> float:
    def repeat() -> None:
        for _ in range(rounds):
            call()

    return 1e3 * time_call(repeat, device=device) / rounds
