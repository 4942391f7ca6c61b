"""All that the first hour on a GPU must answer, in ten minutes: cells of one JSON file, and tables of them.

A cell that fails is told with its error, and the others go on. What cannot be measured here is null, with the reason.
Without a GPU the same code is rehearsed on the CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from vitfreeze.bench.gpu.cells import Cell, Trial
from vitfreeze.bench.gpu.drops import measure_drops, measure_overflow
from vitfreeze.bench.gpu.processes import measure_restart, measure_two_ranks
from vitfreeze.bench.gpu.reference import measure_reference
from vitfreeze.bench.gpu.steps import measure_ds_config, measure_hog, measure_shards, measure_steps
from vitfreeze.bench.timing import list_versions, name_device
from vitfreeze.config import Config, choose_task
from vitfreeze.engine import join_ranks
from vitfreeze.text import format_bytes

MODELS = ("vit_base_patch16", "vit_large_patch16")
DS_CONFIGS = ("zero1_bf16", "zero1_fp16", "zero2_bf16", "zero2_fp16")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GpuBenchmark:
    """The cells, and what one must know to repeat them."""

    device: str
    versions: dict[str, str]
    recipe: str
    images: int  # a step, of one micro-batch
    rounds: int
    seconds: float
    cells: tuple[Cell, ...]


def run_gpu_benchmark(
    config: Config,
    *,
    models: tuple[str, ...] = MODELS,
    images: int = 256,
    rounds: int = 10,
    minutes: float = 10.0,
    reference: Path | None = None,
) -> GpuBenchmark:
    """Measure every cell on one rank.

    Args:
        config: a pre-training recipe; with `data.train` shards are measured too, and a run is killed and goes on.
        models: sizes; the first has all cells, the others those of the step.
        images: of a step, which is one micro-batch.
        rounds: steps between two looks at the clock.
        minutes: after which no group of cells is begun.
        reference: the authors' folder that holds `models_mim.py`.

    Raises:
        ConfigError: a setting cannot be used.
        ValueError: more than one rank, no images or no rounds.
    """
    if images < 1 or rounds < 1:
        raise ValueError(f"images is {images} and rounds {rounds}, expected at least 1")
    ranks = join_ranks()
    if ranks.world_size > 1:
        raise ValueError(f"bench gpu runs on one rank, not {ranks.world_size}: it starts two itself where it can")
    trial = Trial(config=choose_task(config, "pretrain"), models=models, images=images, rounds=rounds)
    start, cells = time.monotonic(), list[Cell]()
    for name, measure in list_groups(trial, reference=reference):
        if time.monotonic() - start > 60 * minutes:
            cells.append(Cell(group=name, name="", reasons={"": f"not begun: {minutes:g} minutes were over"}))
            continue
        logger.info("%.0f s: %s", time.monotonic() - start, name)
        try:
            cells += measure()
        except Exception as error:  # whatever it is, the other cells are to be measured
            logger.exception("%s failed", name)
            cells.append(Cell(group=name, name="", reasons={"": f"{type(error).__name__}: {error}"}, failed=True))
    return GpuBenchmark(
        device=name_device(ranks.device),
        versions=list_versions(ranks.device),
        recipe=config.recipe,
        images=images,
        rounds=rounds,
        seconds=time.monotonic() - start,
        cells=tuple(cells),
    )


def list_groups(trial: Trial, *, reference: Path | None) -> list[tuple[str, Callable[[], Iterator[Cell]]]]:
    """Return the groups in the order in which they are measured, the dearest to lose first."""
    first, steps = trial.models[0], partial(partial, measure_steps, trial)
    groups: list[tuple[str, Callable[[], Iterator[Cell]]]] = [
        (f"steps of {first}", steps(size=first, compile=False)),
        ("HOG", partial(measure_hog, trial)),
        ("drops", partial(measure_drops, trial)),
        ("overflow", partial(measure_overflow, trial)),
        ("shards", partial(measure_shards, trial)),
        ("restart", partial(measure_restart, trial)),
        (f"steps of {first}, compiled", steps(size=first, compile=True)),
        ("two ranks", partial(measure_two_ranks, trial)),
    ]
    if reference is not None:
        groups.append(("authors' code", partial(measure_reference, trial, folder=reference)))
    for size in trial.models[1:]:
        groups += [(f"steps of {size}", steps(size=size, compile=False))]
        groups += [(f"steps of {size}, compiled", steps(size=size, compile=True))]
    for name in [name for name in DS_CONFIGS if name != trial.ds_config]:
        groups.append((f"steps with {name}", partial(measure_ds_config, trial, ds_config=name)))
    return groups


def format_gpu_benchmark(result: GpuBenchmark) -> str:
    """Return the cells as tables in Markdown, one for all neighbours that have the same values."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [f"{result.device}: {result.recipe}, {result.images} images a step, {result.seconds:.0f} s; {versions}"]
    for (group, keys), cells in groupby(result.cells, key=lambda cell: (cell.group, tuple(cell.values))):
        if keys:
            lines += ["", "| " + " | ".join((group, *keys)) + " |", "| --- " * (1 + len(keys)) + "|"]
        for cell in cells:
            values = [_format(key, value) for key, value in cell.values.items()]
            lines += ["| " + " | ".join((cell.name, *values)) + " |"] if keys else []
            lines += [f"\n{group}: {cell.reasons['']}"] if "" in cell.reasons else []
    reasons = sorted({f"{key}: {why}" for cell in result.cells for key, why in cell.reasons.items() if key})
    return "\n".join([*lines, *(["", "not measured:", *reasons] if reasons else [])])


def _format(key: str, value: object) -> str:
    if value is None:
        return "-"
    if key.endswith("_bytes"):
        return format_bytes(float(str(value)))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
