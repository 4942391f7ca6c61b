"""What a run folder holds, as the page needs it."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vitfreeze.config import Config, ConfigError, load_run_config
from vitfreeze.files import read_json_lines
from vitfreeze.planner import Comparison, Plan, compare_run, is_comparable, plan

AXES: Mapping[str, str] = {"step": "step", "hours": "hours of training", "cost": "counted operations (10^15)"}
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run.

    Attributes:
        name: of its folder.
        metrics, events: lines of metrics.jsonl and events.jsonl.
        prediction: its plan, for the ranks and the epochs that the metrics tell of.
        comparison: the plan held against the run; None if nothing was logged before the first freeze.
        versions: of the software that it last started with; empty for runs of older versions.
        pictures: PNGs by step, the newest last.
    """

    name: str
    config: Config
    metrics: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    prediction: Plan
    comparison: Comparison | None
    versions: Mapping[str, str]
    pictures: Sequence[tuple[int, bytes]]

    def places(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        """Return where lines stand on each axis: steps, hours of training, counted operations in 10^15."""
        steps = [line["step"] for line in lines]
        hours, costs = self._hours(), self._costs()
        return {
            "step": steps,
            "hours": [self._interpolate(hours, step) for step in steps],
            "cost": [self._interpolate(costs, step) for step in steps],
        }

    def _hours(self) -> list[tuple[int, float]]:
        """Hours spent in steps until each logged one; freezes, saves and probes are in none of them."""
        points, done = [(0, 0.0)], 0.0
        for line in self.metrics:
            done += (line["step"] - points[-1][0]) * line["step_seconds"] / SECONDS_PER_HOUR
            points.append((line["step"], done))
        return points

    def _costs(self) -> list[tuple[int, float]]:
        points, done = [(0, 0.0)], 0.0
        for stage in self.prediction.stages:
            done += stage.steps * stage.flops_per_image * self.prediction.global_batch / 1e15
            points.append((stage.end_step, done))
        return points

    @staticmethod
    def _interpolate(points: Sequence[tuple[int, float]], step: int) -> float:
        right = min(max(bisect.bisect_left(points, (step, float("-inf"))), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        return y0 if x1 == x0 else y0 + (y1 - y0) * min((step - x0) / (x1 - x0), 1)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder; one that is still written to will do.

    Raises:
        ConfigError: no metrics, or settings that cannot be read.
    """
    metrics = _in_order(read_json_lines(folder / "metrics.jsonl"))
    if not metrics:
        raise ConfigError(f"{folder} holds no metrics.jsonl with a logged step, so there is nothing to report")
    events = read_json_lines(folder / "events.jsonl")
    config = load_run_config(folder / "config.yaml")
    last = metrics[-1]
    steps_per_epoch = max(round(last["step"] / last["epoch"]), 1)
    return RunRecord(
        name=folder.resolve().name, config=config, metrics=metrics, events=events,
        prediction=plan(config, steps_per_epoch=steps_per_epoch, world_size=last["world_size"], events=events),
        comparison=compare_run(config, metrics, events=events) if is_comparable(metrics) else None,
        versions=next((event["versions"] for event in reversed(events) if "versions" in event), {}),
        pictures=_read_pictures(folder / "tensorboard"),
    )  # fmt: skip


def _in_order(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return lines by step; of a step that was logged twice, the later line."""
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]


def _read_pictures(folder: Path) -> list[tuple[int, bytes]]:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    if not folder.is_dir():
        return []
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it says at every file that the next is not there
    accumulator = EventAccumulator(str(folder), size_guidance={IMAGES: 0})
    accumulator.Reload()
    pictures = {
        event.step: event.encoded_image_string
        for tag in accumulator.Tags()[IMAGES]
        for event in accumulator.Images(tag)
    }
    return sorted(pictures.items())


def freezes_of(run: RunRecord) -> list[Mapping[str, Any]]:
    """Return the events at which layers froze."""
    return [event for event in run.events if event["event"] == "freeze"]


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return settings by key, one value a run: all of them for one run, those that differ for several."""
    flat = [_flatten(asdict(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    values = {key: [str(settings.get(key, "")) for settings in flat] for key in keys}
    return values if len(runs) == 1 else {key: shown for key, shown in values.items() if len(set(shown)) > 1}


def stages_of(run: RunRecord) -> list[tuple[int, int]]:
    """Return (step, image size) at the start of the run and at every change."""
    sizes = [(stage.first_step, stage.images.img_size) for stage in run.prediction.stages]
    return sizes[:1] + [after for before, after in pairwise(sizes) if after[1] != before[1]]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
