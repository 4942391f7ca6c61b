"""Measured steps, from which a plan predicts for one machine. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vitfreeze.config import ConfigError
from vitfreeze.files import read_json
from vitfreeze.planner.costs import EncoderCosts


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Milliseconds of a training step at some lengths of the frozen prefix, measured on one machine."""

    source: str
    images: int  # per step and rank
    step_ms: Mapping[int, float]

    @property
    def ms_per_image(self) -> float:
        """Milliseconds per image before anything is frozen."""
        return self.step_ms[0] / self.images

    def relative_cost(self, frozen_layers: int, *, costs: EncoderCosts) -> float:
        """Return the cost of a step relative to the start.

        Between measured prefixes the measured cost falls as the counted operations do; beyond the last one it keeps
        its ratio to them.
        """
        below = max(k for k in self.step_ms if k <= frozen_layers)
        above = min((k for k in self.step_ms if k >= frozen_layers), default=None)
        flops, start = costs.step_flops(frozen_layers), self.step_ms[below] / self.step_ms[0]
        if above is None:
            return start * flops / costs.step_flops(below)
        if above == below:
            return start
        along = (costs.step_flops(below) - flops) / (costs.step_flops(below) - costs.step_flops(above))
        return start + along * (self.step_ms[above] / self.step_ms[0] - start)


def relative_cost(frozen_layers: int, *, costs: EncoderCosts, times: StepTimes | None) -> float:
    """Return the cost of a step relative to the start: as measured, or else by its counted operations."""
    if times is not None:
        return times.relative_cost(frozen_layers, costs=costs)
    return costs.step_flops(frozen_layers) / costs.step_flops(0)


def read_step_times(path: Path) -> StepTimes:
    """Read what `vitfreeze bench step --json` printed.

    Raises:
        ConfigError: the file cannot be read, or lacks the steps before anything is frozen or the images per step.
    """
    try:
        content = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{error}; expected what `vitfreeze bench step --json` prints") from None
    try:
        step_ms = {int(row["frozen_layers"]): float(row["step_ms"]) for row in content["rows"]}
        images = int(content["micro_batch"]) * int(content.get("accumulation", 1))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise ConfigError(
            f"{path} does not hold what `vitfreeze bench step --json` prints: a number micro_batch, and rows with the "
            "numbers frozen_layers and step_ms each"
        ) from None
    if 0 not in step_ms or len(step_ms) < 2 or images < 1 or not all(0 < ms < math.inf for ms in step_ms.values()):
        raise ConfigError(
            f"{path} must hold the time of a step with 0 frozen layers and with at least one other number"
        )
    return StepTimes(source=path.name, images=images, step_ms=step_ms)
