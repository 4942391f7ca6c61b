"""What a training step costs on this machine, part by part, at several lengths of the frozen prefix.

A step is one micro-batch of random images through `LocalMIM`, its backward pass and AdamW, without DeepSpeed and
without a data pipeline. The lengths are measured in turn, round by round, and beside them a unit that can be measured
anywhere: forward and backward pass of 12 plain timm blocks of ViT-B on a batch of 8 x 50 tokens. What disturbs the
machine then disturbs them all, and ratios of one round hold better than milliseconds.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitfreeze import __version__
from vitfreeze.architecture import MODEL_SIZES, active_heads
from vitfreeze.model import hog_targets
from vitfreeze.model.local_mim import LAYER_NORM_EPS, LocalMIM
from vitfreeze.planner import ModelCosts
from vitfreeze.text import format_table

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
Mark = float | torch.cuda.Event
MASK_RATIO = 0.75
_UNIT_BLOCKS, _UNIT_BATCH, _UNIT_TOKENS, _UNIT_WIDTH, _UNIT_HEADS = 12, 8, 50, 768, 12


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """Medians at one length of the frozen prefix; `ratio` and `in_units` are medians of the rounds' ratios."""

    frozen_layers: int
    targets_ms: float
    forward_ms: float  # without the targets
    backward_ms: float
    optimizer_ms: float
    step_ms: float
    step_ms_quartiles: tuple[float, float]
    images_per_second: float
    peak_memory_bytes: int | None  # of the GPU's tensors; on a CPU of the whole process, where the system tells
    ratio: float  # to a step with nothing frozen
    ratio_of_flops: float  # what counted operations allow
    in_units: float


@dataclass(frozen=True, kw_only=True)
class StepBenchmark:
    """A benchmark with all that one must know to repeat it."""

    device: str
    versions: dict[str, str]
    size: str
    img_size: int
    micro_batch: int
    precision: str
    compiled: bool
    optimizer: str
    clock: str
    threads: int
    rounds: int
    unit_ms: float
    unit_ms_quartiles: tuple[float, float]
    targets_in_units: float  # HOG targets of all four heads
    rows: tuple[StepRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of one step."""

    targets: float
    forward: float
    backward: float
    optimizer: float

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.optimizer


def run_step_benchmark(
    size: str,
    *,
    frozen_layers: Sequence[int] | None = None,
    micro_batch: int = 8,
    precision: str = "fp32",
    img_size: int = 224,
    hog_nbins: int = 9,
    device: str = "",
    compiled: bool = False,
    rounds: int = 5,
    warmup_rounds: int = 2,
    clock: str = "wall",
) -> StepBenchmark:
    """Measure steps of a model of `MODEL_SIZES`.

    Args:
        size: name in `MODEL_SIZES`.
        frozen_layers: lengths of the prefix; five evenly spread by default. 0 is always measured, for the ratios.
        micro_batch: images per step.
        precision: of weights and activations; below fp32, AdamW keeps master weights in fp32.
        device: cpu or cuda; a GPU when there is one by default.
        compiled: torch.compile on every block and head.
        rounds, warmup_rounds: every length is measured once in each.
        clock: wall, or processor: the seconds that all threads of this process worked, whatever else the machine
            does. On a GPU always the GPU's own clock.

    Raises:
        ValueError: a name, a length or a count that does not exist or makes no sense.
    """
    _check(size, precision=precision, clock=clock, rounds=rounds, micro_batch=micro_batch)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prefixes = _choose_prefixes(frozen_layers, depth=MODEL_SIZES[size].depth)
    torch.manual_seed(0)
    model = LocalMIM(img_size=img_size, hog_nbins=hog_nbins, mask_ratio=MASK_RATIO, **asdict(MODEL_SIZES[size]))
    if compiled:
        model.compile_parts()
    bench = _Bench(
        model, micro_batch=micro_batch, dtype=PRECISIONS[precision], device=place, clock=CLOCKS[clock]
    )  # fmt: skip
    # Falling lengths need rising memory, so that no peak hides a later one.
    memory = {k: bench.peak_memory(k) for k in sorted(prefixes, reverse=True)}
    times, units, all_targets = bench.measure(prefixes, rounds=rounds, warmup_rounds=warmup_rounds)
    costs = ModelCosts(size=MODEL_SIZES[size], img_size=img_size, mask_ratio=MASK_RATIO, hog_nbins=hog_nbins)
    rows = [
        _summarize(
            k, times[k], start=times[0], units=units, micro_batch=micro_batch, memory=memory[k],
            ratio_of_flops=costs.step_flops(k) / costs.step_flops(0),
        )
        for k in prefixes
    ]  # fmt: skip
    return StepBenchmark(
        device=name_device(place), versions=list_versions(place), size=size, img_size=img_size, micro_batch=micro_batch,
        precision=precision, compiled=compiled, optimizer="torch.optim.AdamW(fused=True)",
        clock="GPU" if place.type == "cuda" else clock, threads=torch.get_num_threads(), rounds=rounds,
        unit_ms=1e3 * statistics.median(units), unit_ms_quartiles=_quartiles(units),
        targets_in_units=statistics.median(t / u for t, u in zip(all_targets, units, strict=True)), rows=tuple(rows),
    )  # fmt: skip


def _check(size: str, *, precision: str, clock: str, rounds: int, micro_batch: int) -> None:
    for what, given, allowed in (
        ("size", size, MODEL_SIZES), ("precision", precision, PRECISIONS), ("clock", clock, CLOCKS),
    ):  # fmt: skip
        if given not in allowed:
            raise ValueError(f"{what} {given!r}: allowed are {', '.join(allowed)}")
    for what, count in (("rounds", rounds), ("micro_batch", micro_batch)):
        if count < 1:
            raise ValueError(f"{what} is {count}, expected at least 1")


def _choose_prefixes(frozen_layers: Sequence[int] | None, *, depth: int) -> list[int]:
    if frozen_layers is None:
        return [round(depth * quarter / 4) for quarter in range(5)]
    for k in frozen_layers:
        if not 0 <= k <= depth:
            raise ValueError(f"{k} frozen layers are not possible, expected 0 to depth {depth}")
    return sorted({0, *frozen_layers})


class StepTimer:
    """A model with its optimizer and a batch of random images on one device; measures steps and their parts."""

    def __init__(
        self, model: LocalMIM, *, micro_batch: int, dtype: torch.dtype, device: torch.device, clock: Callable[[], float]
    ) -> None:
        self.device, self.dtype, self.clock = device, dtype, clock
        self.model = model.to(device=device, dtype=dtype)
        self.optimizer = _MasterAdamW(self.model)
        self.images = torch.randn(micro_batch, 3, model.img_size, model.img_size, device=device)

    def time_step(self, frozen_layers: int) -> StepSeconds:
        """Take a step with that many layers frozen."""
        targets = self.time_targets(frozen_layers)
        marks = [self.mark()]
        loss = self.model(self.images, frozen_layers=frozen_layers).loss
        marks.append(self.mark())
        loss.backward()
        marks.append(self.mark())
        self.optimizer.step()
        marks.append(self.mark())
        forward, backward, optimizer = (seconds_between(*pair) for pair in pairwise(marks))
        return StepSeconds(targets=targets, forward=forward, backward=backward, optimizer=optimizer)

    def time_targets(self, frozen_layers: int) -> float:
        """Return the seconds that the HOG targets of the living heads take."""
        cells = [self.model.cell_sizes[k] for k in active_heads(frozen_layers, depth=self.model.depth)]
        start = self.mark()
        hog_targets(self.images, cell_sizes=cells, nbins=self.model.hog_nbins, bias=self.model.hog_bias)
        return seconds_between(start, self.mark())

    def peak_memory(self, frozen_layers: int) -> int | None:
        """Return the bytes at the highest point of a step whose optimizer has its moments already."""
        self.time_step(frozen_layers)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif not _reset_peak_of_process():
            return None
        self.time_step(frozen_layers)
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _read_peak_of_process()

    def mark(self) -> Mark:
        """Return this moment, by the clock of the device."""
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Bench(StepTimer):
    """A timer that measures beside its steps the unit's blocks."""

    def __init__(self, model: LocalMIM, **options: Any) -> None:
        super().__init__(model, **options)
        norm_layer = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        blocks = [Block(_UNIT_WIDTH, _UNIT_HEADS, qkv_bias=True, norm_layer=norm_layer) for _ in range(_UNIT_BLOCKS)]
        self.unit = nn.Sequential(*blocks).to(device=self.device, dtype=self.dtype)
        shape = (_UNIT_BATCH, _UNIT_TOKENS, _UNIT_WIDTH)
        self.unit_tokens = torch.randn(shape, device=self.device, dtype=self.dtype)

    def measure(
        self, prefixes: Sequence[int], *, rounds: int, warmup_rounds: int
    ) -> tuple[dict[int, list[StepSeconds]], list[float], list[float]]:
        """Return the steps, the units and the targets of all heads, one of each per round."""
        times: dict[int, list[StepSeconds]] = {k: [] for k in prefixes}
        units, targets = [], []
        for number in range(-warmup_rounds, rounds):
            unit = self.time_unit()
            round_targets = self.time_targets(0)
            steps = {k: self.time_step(k) for k in prefixes}
            unit = (unit + self.time_unit()) / 2
            if number >= 0:
                units.append(unit)
                targets.append(round_targets)
                for k, step in steps.items():
                    times[k].append(step)
        return times, units, targets

    def time_unit(self) -> float:
        start = self.mark()
        self.unit(self.unit_tokens).square().mean().backward()
        seconds = seconds_between(start, self.mark())
        self.unit.zero_grad()
        return seconds


class _MasterAdamW:
    """AdamW, on fp32 copies of the weights where these are in half precision, as an engine for training keeps them."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        half = self.weights[0].dtype != torch.float32
        self.masters = [w.detach().float() if half else w for w in self.weights]
        self.adamw = torch.optim.AdamW(self.masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update what has a gradient, which the frozen prefix does not, and drop the gradients."""
        changed = [(w, m) for w, m in zip(self.weights, self.masters, strict=True) if w.grad is not None]
        for weight, master in changed:
            if master is not weight:
                master.grad = cast(Tensor, weight.grad).float()
                weight.grad = None
        self.adamw.step()
        for weight, master in changed:
            if master is not weight:
                weight.copy_(master)
        self.adamw.zero_grad()


def seconds_between(start: Mark, end: Mark) -> float:
    """Return the seconds between two marks of the same clock; on a GPU this waits for the second."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    return cast(float, end) - cast(float, start)


def _reset_peak_of_process() -> bool:
    """Let Linux forget the highest resident size of this process so far; False where there is no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _read_peak_of_process() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartile in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * list(seconds)
    return 1e3 * low, 1e3 * high


def _summarize(
    frozen_layers: int,
    times: Sequence[StepSeconds],
    *,
    start: Sequence[StepSeconds],
    units: Sequence[float],
    micro_batch: int,
    memory: int | None,
    ratio_of_flops: float,
) -> StepRow:
    def milliseconds(part: Callable[[StepSeconds], float]) -> float:
        return 1e3 * statistics.median(part(step) for step in times)

    step_ms = milliseconds(lambda t: t.step)
    return StepRow(
        frozen_layers=frozen_layers,
        targets_ms=milliseconds(lambda t: t.targets),
        forward_ms=milliseconds(lambda t: t.forward - t.targets),
        backward_ms=milliseconds(lambda t: t.backward),
        optimizer_ms=milliseconds(lambda t: t.optimizer),
        step_ms=step_ms,
        step_ms_quartiles=_quartiles([t.step for t in times]),
        images_per_second=1e3 * micro_batch / step_ms,
        peak_memory_bytes=memory,
        ratio=statistics.median(t.step / s.step for t, s in zip(times, start, strict=True)),
        ratio_of_flops=ratio_of_flops,
        in_units=statistics.median(t.step / u for t, u in zip(times, units, strict=True)),
    )


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


def format_step_benchmark(result: StepBenchmark) -> str:
    """Return the result as a table under the settings it was measured with."""
    low, high = result.unit_ms_quartiles
    head = [
        f"{result.size}, {result.img_size} pixels, {result.micro_batch} images per step, {result.precision}"
        + (", torch.compile" if result.compiled else ""),
        f"{result.device}, {result.threads} threads; " + ", ".join(f"{k} {v}" for k, v in result.versions.items()),
        f"{result.optimizer}; medians of {result.rounds} rounds by the {result.clock} clock, quartiles in brackets",
        f"unit: {result.unit_ms:.0f} ms [{low:.0f}-{high:.0f}], 12 plain blocks of ViT-B on 8 x 50 tokens, there and "
        f"back; HOG targets of all heads cost {result.targets_in_units:.4f} of it",
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
