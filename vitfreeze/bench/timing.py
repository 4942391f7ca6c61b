"""How the benchmarks measure the engine's steps: a recipe's engine on random images, clocks, and what to write beside.

The step is training's own, made of the recipe's settings: model, micro-batches, precision, optimizer, ZeRO stage.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from torch import Tensor

from vitfreeze import __version__
from vitfreeze.config import Config, choose_task
from vitfreeze.engine import FreezingEngine, join_ranks
from vitfreeze.training.build import build_engine

Clock = Callable[[], float]
CLOCKS: Mapping[str, Clock] = MappingProxyType({"wall": time.perf_counter, "processor": time.process_time})
LEARNING_RATE = 1e-4  # any will do: the time of a step does not depend on it


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What one must know to repeat a measurement."""

    device: str
    versions: dict[str, str]
    recipe: str
    model: str
    img_size: int
    world_size: int
    zero_stage: int
    precision: str
    micro_batch: int  # images a rank
    accumulation: int
    threads: int
    rounds: int

    def lines(self) -> list[str]:
        """Return them as the head of a table."""
        ranks = f"{self.world_size} rank" + ("s" if self.world_size > 1 else "")
        return [
            f"{self.recipe}: {self.model}, {self.img_size} pixels, on {ranks}, ZeRO stage {self.zero_stage}, "
            f"{self.precision}, micro-batch {self.micro_batch} x {self.accumulation}",
            f"{self.device}, {self.threads} threads a rank; " + ", ".join(f"{k} {v}" for k, v in self.versions.items()),
        ]


def describe_conditions(config: Config, engine: FreezingEngine, *, rounds: int) -> dict[str, Any]:
    """Return the fields of `Conditions`."""
    return {
        "device": name_device(engine.device),
        "versions": list_versions(engine.device),
        "recipe": config.recipe,
        "model": config.model.size,
        "img_size": config.model.img_size,
        "world_size": engine.world_size,
        "zero_stage": engine.settings.stage,
        "precision": engine.settings.precision,
        "micro_batch": engine.micro_batch,
        "accumulation": engine.accumulation,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }


def start_engine(config: Config, *, rounds: int) -> tuple[FreezingEngine, Tensor]:
    """Return the engine of a pre-training recipe, in which layers are dropped as they freeze, and random images.

    Raises:
        ConfigError: a setting cannot be used, or the recipe is for fine-tuning.
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    config = choose_task(config, "pretrain")
    at_once = replace(config, freeze=replace(config.freeze, min_steps_between_drops=0))
    engine = build_engine(at_once, join_ranks(), frozen_layers=0)
    engine.set_learning_rates(dict.fromkeys(engine.unit_names, LEARNING_RATE))
    side = config.model.img_size
    return engine, torch.randn(engine.micro_batch, 3, side, side, device=engine.device)


def check_clock(name: str) -> None:
    """Refuse a clock that there is not; raises ValueError."""
    if name not in CLOCKS:
        raise ValueError(f"clock {name!r}: allowed are {', '.join(CLOCKS)}")


def choose_clock(name: str, *, device: torch.device) -> tuple[str, Clock]:
    """Return a clock and its name; on a GPU, which works beside the processor, always the wall's."""
    name = "wall" if device.type == "cuda" else name
    return name, CLOCKS[name]


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of one step, and of its parts."""

    forward: float
    backward: float
    optimizer: float

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.optimizer


def time_step(
    engine: FreezingEngine,
    images: Tensor,
    *,
    clock: Clock = time.perf_counter,
    treatment: Mapping[str, float] | None = None,
) -> StepSeconds:
    """Take one optimizer step of the engine, every micro-batch of which is `images`.

    `treatment` is what the model is told of masks, such as its `mask_ratio`; what it does by itself, if None.
    """
    marks = [mark(engine.device, clock)]
    for _ in range(engine.accumulation):
        loss = engine(images, frozen_layers=engine.frozen_layers, **(treatment or {})).loss
        marks.append(mark(engine.device, clock))
        engine.backward(loss)
        marks.append(mark(engine.device, clock))
        engine.step()
        marks.append(mark(engine.device, clock))
    seconds = [end - start for start, end in pairwise(marks)]
    return StepSeconds(forward=sum(seconds[::3]), backward=sum(seconds[1::3]), optimizer=sum(seconds[2::3]))


def time_call(call: Callable[[], object], *, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Return the seconds of a call."""
    start = mark(device, clock)
    call()
    return mark(device, clock) - start


def mark(device: torch.device, clock: Clock) -> float:
    """Return the time at which the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def name_device(device: torch.device) -> str:
    """Return the model of a GPU, or of this machine's CPU with the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {len(names) or '?'} cores"


def list_versions(device: torch.device) -> dict[str, str]:
    """Return the versions that a time depends on, by name."""
    versions = {"vitfreeze": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions["timm"] = timm.__version__
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return versions
