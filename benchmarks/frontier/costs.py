"""What a run costs by the planner's count, and how long a run is that costs a given sum."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.frontier.errors import InputError

SECONDS_PER_HOUR = 3600
Run = Callable[[tuple[str, ...]], str]  # runs a command of vitfreeze and returns what it prints


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps of a run between two freezes: [first, end), each of them costing `flops`."""

    first: int
    end: int
    flops: float


def count_cost(stretches: Sequence[Stretch], *, stop_step: int | None = None) -> float:
    """Return the operations of a run, or of its first `stop_step` steps: forward and backward, no optimizer."""
    ends = [stretch.end if stop_step is None else min(stretch.end, stop_step) for stretch in stretches]
    return sum(max(end - part.first, 0) * part.flops for end, part in zip(ends, stretches, strict=True))


def find_length(cost_of: Callable[[int], float], target: float, *, guess: int) -> int:
    """Return the most steps of a run that cost at most `target`, searched from a guess that is nearly right.

    Raises:
        InputError: not even one step costs so little.
    """
    steps = max(guess, 1)
    while cost_of(steps) > target:
        steps -= 1
        if steps == 0:
            raise InputError(f"the budget of {target:.3g} operations is less than one step costs")
    while cost_of(steps + 1) <= target:
        steps += 1
    return steps


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Counts by asking `vitfreeze plan --json`.

    Attributes:
        run: how a command of vitfreeze is run.
        images: training images of an epoch.
    """

    run: Run
    images: int

    def plan(self, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
        """Return the plan of a run as the command line prints it."""
        return json.loads(self.run(("plan", recipe, *overrides, "--images", str(self.images), "--json")))

    def stretches(self, recipe: str, overrides: Sequence[str]) -> tuple[Stretch, ...]:
        """Return the stretches of a run."""
        plan = self.plan(recipe, overrides)
        return tuple(
            Stretch(
                first=stage["first_step"], end=stage["end_step"], flops=stage["flops_per_image"] * plan["global_batch"]
            )
            for stage in plan["stages"]
        )

    def length_for(self, recipe: str, overrides: Sequence[str], target: float) -> int:
        """Return the most steps that a recipe may take within `target` operations."""

        @functools.cache
        def cost_of(steps: int) -> float:
            return count_cost(self.stretches(recipe, [*overrides, f"run.length={steps} steps"]))

        trial = 1000
        return find_length(cost_of, target, guess=round(trial * target / cost_of(trial)))
