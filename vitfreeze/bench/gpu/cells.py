"""What the cells of the GPU benchmark have in common: a trial's settings, its engine and steps, what a cell is."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from vitfreeze.bench.timing import mark, start_engine
from vitfreeze.config import Config
from vitfreeze.data import normalize, tabulate
from vitfreeze.engine import FreezingEngine, best_ds_config, join_ranks
from vitfreeze.model import Pixels

FROZEN_LAYERS = (0, 6, 12)
REPEATS = 3
NO_GPU = "there is no CUDA device"


@dataclass(frozen=True)
class Unmeasured:
    """Stands for a value that could not be measured."""

    reason: str


Value: TypeAlias = "float | int | str | bool | None"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the result; a value that is None has its reason, and `failed` says that an error is the reason."""

    group: str
    name: str
    values: dict[str, Value] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    failed: bool = False


def tell(group: str, name: str, **values: float | str | Unmeasured) -> Cell:
    """Return a cell, with the reasons of what was not measured apart."""
    reasons = {key: value.reason for key, value in values.items() if isinstance(value, Unmeasured)}
    told = {key: None if isinstance(value, Unmeasured) else value for key, value in values.items()}
    return Cell(group=group, name=name, values=told, reasons=reasons)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is measured: a recipe, in steps of one micro-batch of so many images; `rounds` steps between two looks."""

    config: Config
    models: tuple[str, ...]
    images: int
    rounds: int

    @property
    def ds_config(self) -> str:
        """The recipe's setting of DeepSpeed, or what suits the device."""
        return self.config.run.ds_config or best_ds_config(join_ranks().device)

    def configure(self, *, size: str = "", compile: bool = False, ds_config: str = "") -> Config:
        """Return the recipe with the trial's batch, and another model, or setting of DeepSpeed, if one is named."""
        config = self.config
        return replace(
            config,
            model=replace(config.model, size=size or self.models[0], compile=compile),
            batch=replace(config.batch, global_size=self.images, micro_size=self.images),
            run=replace(config.run, ds_config=ds_config or self.ds_config),
        )


class Stepper:
    """An engine and random bytes, of which it takes steps as pre-training does."""

    def __init__(self, engine: FreezingEngine, config: Config, *, images: int) -> None:
        self.engine, self.colours = engine, config.data.colours
        shape = (images, 3, config.model.img_size, config.model.img_size)
        self.bytes_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, device=engine.device)

    def take(self, bytes_BCHW: Tensor | None = None, *, noise: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """Take an optimizer step, by default of the stepper's own images, and return its loss, for which none waits."""
        given = self.bytes_BCHW if bytes_BCHW is None else bytes_BCHW
        pixels = Pixels(given, tabulate(given.device, self.colours)) if factor == 1 else None
        loss: Tensor = self.engine(normalize(given, colours=self.colours) * factor, noise=noise, pixels=pixels).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss

    def time_steps(self, rounds: int) -> float:
        """Return the seconds of a step: the median of some runs of `rounds` steps, in which nobody waits."""
        return statistics.median(self.time_run(rounds) / rounds for _ in range(REPEATS))

    def time_run(self, rounds: int = 1) -> float:
        """Return the seconds of so many steps."""
        start = mark(self.engine.device, time.perf_counter)
        for _ in range(rounds):
            self.take()
        return mark(self.engine.device, time.perf_counter) - start

    def peak_bytes(self) -> int | Unmeasured:
        """Return the most bytes of tensors that a step holds at once."""
        device = self.engine.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.take()
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else Unmeasured(NO_GPU)


@contextmanager
def open_stepper(config: Config, *, images: int) -> Iterator[Stepper]:
    """Start an engine, and end it with all its memory."""
    engine, _ = start_engine(config, rounds=1)
    try:
        yield Stepper(engine, config, images=images)
    finally:
        device = engine.device
        engine.destroy()
        del engine
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
