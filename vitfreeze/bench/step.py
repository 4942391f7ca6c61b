"""What a training step costs on this machine, part by part, at several lengths of the frozen prefix.

A step is the engine's own, with the settings of a recipe, on random images, without a data pipeline. After each of its
steps a unit is measured that can be measured anywhere: forward and backward pass of 12 plain timm blocks of ViT-B on a
batch of 8 x 50 tokens. What disturbs the machine then disturbs both, and their ratio holds better than milliseconds.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitfreeze.architecture import active_heads
from vitfreeze.bench.timing import (
    Clock,
    Conditions,
    StepSeconds,
    check_clock,
    choose_clock,
    describe_conditions,
    start_engine,
    time_call,
    time_step,
)
from vitfreeze.config import Config
from vitfreeze.engine import FreezingEngine
from vitfreeze.model.local_mim import LAYER_NORM_EPS
from vitfreeze.planner import costs_of, quartiles
from vitfreeze.text import format_table

_UNIT_BLOCKS, _UNIT_BATCH, _UNIT_TOKENS, _UNIT_WIDTH, _UNIT_HEADS = 12, 8, 50, 768, 12


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """Medians at one length of the frozen prefix; `in_units` is the median of the rounds' ratios."""

    frozen_layers: int
    targets_ms: float
    forward_ms: float  # without the targets
    backward_ms: float
    optimizer_ms: float
    step_ms: float
    step_ms_quartiles: tuple[float, float]
    images_per_second: float  # of a rank
    peak_memory_bytes: int | None  # of the GPU's tensors; on a CPU of the whole process, where the system tells
    in_units: float
    ratio: float  # of in_units to that with nothing frozen
    ratio_of_flops: float = 1.0  # what counted operations allow


@dataclass(frozen=True, kw_only=True)
class StepBenchmark(Conditions):
    """A benchmark with all that one must know to repeat it."""

    clock: str
    unit_ms: float
    unit_ms_quartiles: tuple[float, float]
    rows: tuple[StepRow, ...]


def run_step_benchmark(
    config: Config,
    *,
    frozen_layers: Sequence[int] | None = None,
    rounds: int = 5,
    warmup_rounds: int = 2,
    clock: str = "wall",
) -> StepBenchmark:
    """Measure the steps of a recipe's engine; under a launcher all ranks call it.

    Args:
        config: the run; its data is not read, images are random.
        frozen_layers: lengths of the prefix; five evenly spread by default. 0 is always measured, for the ratios.
        rounds, warmup_rounds: steps at every length.
        clock: wall, or processor: the seconds that all threads of this process worked, whatever else the machine
            does. On a GPU always wall.

    Raises:
        ConfigError: a setting cannot be used.
        ValueError: a clock, a length or a count that does not exist or makes no sense.
    """
    check_clock(clock)
    prefixes = choose_prefixes(frozen_layers, depth=config.model.resolve().depth)
    engine, images = start_engine(config, rounds=rounds)
    clock, read_clock = choose_clock(clock, device=engine.device)
    bench = _Bench(engine, images, clock=read_clock)
    costs, rows = costs_of(config), list[StepRow]()
    for k in prefixes:
        row = bench.measure(k, rounds=rounds, warmup_rounds=warmup_rounds, start=rows[0] if rows else None)
        rows.append(replace(row, ratio_of_flops=costs.step_flops(k) / costs.step_flops(0)))
    return StepBenchmark(
        **describe_conditions(config, engine, rounds=rounds),
        clock=clock,
        unit_ms=1e3 * statistics.median(bench.units),
        unit_ms_quartiles=_quartiles_ms(bench.units),
        rows=tuple(rows),
    )


def choose_prefixes(frozen_layers: Sequence[int] | None, *, depth: int) -> list[int]:
    if frozen_layers is None:
        return [round(depth * quarter / 4) for quarter in range(5)]
    for k in frozen_layers:
        if not 0 <= k <= depth:
            raise ValueError(f"{k} frozen layers are not possible, expected 0 to depth {depth}")
    return sorted({0, *frozen_layers})


class _Bench:
    """The engine on one batch of images, and beside it the unit's blocks."""

    def __init__(self, engine: FreezingEngine, images: Tensor, *, clock: Clock) -> None:
        self.engine, self.images, self.clock = engine, images, clock
        self.units: list[float] = []  # seconds
        norm_layer = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        blocks = [Block(_UNIT_WIDTH, _UNIT_HEADS, qkv_bias=True, norm_layer=norm_layer) for _ in range(_UNIT_BLOCKS)]
        self.unit = nn.Sequential(*blocks).to(device=engine.device, dtype=engine.dtype)
        shape = (_UNIT_BATCH, _UNIT_TOKENS, _UNIT_WIDTH)
        self.unit_tokens = torch.randn(shape, device=engine.device, dtype=engine.dtype)

    def measure(self, frozen_layers: int, *, rounds: int, warmup_rounds: int, start: StepRow | None) -> StepRow:
        """Freeze up to a length of the prefix, and take one step, unit and set of targets per round."""
        self.engine.freeze(frozen_layers, step=frozen_layers)
        self.time_unit()  # its memory, where it is kept, is then part of every peak
        memory = self.peak_memory()
        steps, targets, units = list[StepSeconds](), list[float](), list[float]()
        for number in range(-warmup_rounds, rounds):
            before = self.time_unit()
            seconds = self.time_targets(), time_step(self.engine, self.images, clock=self.clock)
            if number >= 0:
                targets.append(seconds[0])
                steps.append(seconds[1])
                units.append((before + self.time_unit()) / 2)
        self.units += units

        def milliseconds(part: Callable[[StepSeconds], float]) -> float:
            return 1e3 * statistics.median(part(step) for step in steps)

        targets_ms, step_ms = 1e3 * statistics.median(targets), milliseconds(lambda step: step.step)
        in_units = statistics.median(step.step / unit for step, unit in zip(steps, units, strict=True))
        return StepRow(
            frozen_layers=frozen_layers,
            targets_ms=targets_ms,
            forward_ms=milliseconds(lambda step: step.forward) - targets_ms,
            backward_ms=milliseconds(lambda step: step.backward),
            optimizer_ms=milliseconds(lambda step: step.optimizer),
            step_ms=step_ms,
            step_ms_quartiles=_quartiles_ms([step.step for step in steps]),
            images_per_second=1e3 * len(self.images) * self.engine.accumulation / step_ms,
            peak_memory_bytes=memory,
            in_units=in_units,
            ratio=in_units / start.in_units if start else 1.0,
        )

    def time_targets(self) -> float:
        """Return the seconds that the targets of the living heads take in a step."""
        model = self.engine.module
        heads = active_heads(model.units, self.engine.frozen_layers)
        call = partial(model.make_targets, self.images, heads=heads)
        return self.engine.accumulation * time_call(call, device=self.engine.device, clock=self.clock)

    def time_unit(self) -> float:
        """Return the seconds of the unit."""

        def there_and_back() -> None:
            self.unit(self.unit_tokens).square().mean().backward()

        seconds = time_call(there_and_back, device=self.engine.device, clock=self.clock)
        self.unit.zero_grad()
        return seconds

    def peak_memory(self) -> int | None:
        """Return the bytes at the highest point of a step, after one that has filled every buffer."""
        time_step(self.engine, self.images)
        on_gpu = self.engine.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.engine.device)
        elif not _reset_peak_of_process():
            return None
        time_step(self.engine, self.images)
        return torch.cuda.max_memory_allocated(self.engine.device) if on_gpu else _read_peak_of_process()


def _reset_peak_of_process() -> bool:
    """Give back memory that is kept for reuse, and let Linux forget the highest resident size of this process so far.

    Returns False where there is no such thing.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _read_peak_of_process() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _quartiles_ms(seconds: Sequence[float]) -> tuple[float, float]:
    low, high = quartiles(seconds)
    return 1e3 * low, 1e3 * high


def format_step_benchmark(result: StepBenchmark) -> str:
    """Return the result as a table under the settings it was measured with."""
    low, high = result.unit_ms_quartiles
    head = [
        *result.lines(),
        f"medians of {result.rounds} rounds by the {result.clock} clock, quartiles in brackets",
        f"unit: {result.unit_ms:.0f} ms [{low:.0f}-{high:.0f}], 12 plain blocks of ViT-B on 8 x 50 tokens, there and "
        f"back; HOG targets of all heads cost {result.rows[0].targets_ms / result.unit_ms:.4f} of it",
    ]
    columns = ["frozen", "targets", "forward", "backward", "optimizer", "step", "ms", "images/s", "peak GB", "ratio"]
    rows = [[*columns, "by FLOPs", "units"]]
    for row in result.rows:
        memory = "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e9:.2f}"
        low, high = row.step_ms_quartiles
        parts = (row.targets_ms, row.forward_ms, row.backward_ms, row.optimizer_ms, row.step_ms)
        cells = [str(row.frozen_layers), *(f"{part:.1f}" for part in parts), f"[{low:.1f}-{high:.1f}]"]
        cells += [f"{row.images_per_second:.1f}", memory, f"{row.ratio:.3f}", f"{row.ratio_of_flops:.3f}"]
        rows.append([*cells, f"{row.in_units:.3f}"])
    return "\n".join([*head, "", format_table(rows)])
