"""The plan of a run held against what was measured in it. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from vitfreeze.config import Config
from vitfreeze.curriculum import ImageStage
from vitfreeze.planner.prediction import Plan, Stage, plan

# Frozen layers, image size, mask ratio and decoded share: what decides the cost of a step.
_Kind = tuple[int, int, float, float]


@dataclass(frozen=True, kw_only=True)
class StageComparison:
    """One stage of a run: what was predicted and what was measured; a step without freezing and curriculum costs 1."""

    frozen_layers: int
    images: ImageStage
    steps: int  # that the metrics cover
    images_per_second: float  # median
    predicted_cost: float
    measured_cost: float
    measured_range: tuple[float, float]  # measured_cost between the quartiles of the logged speeds
    data_wait_fraction: float  # mean
    predicted_state_bytes: int
    measured_state_bytes: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The plan held against a run.

    Savings are shares of the compute time that the steps which the metrics cover would have taken without freezing and
    curriculum. That time is measured where the run took such steps; if it did not, it is what the plan says beside the
    dearest of its steps before the first freeze, `reference`.
    """

    stages: tuple[StageComparison, ...]
    reference: StageComparison
    predicted_saving: float
    measured_saving: float
    freezing_seconds: float  # spent on dropping layers, which no step contains

    @property
    def has_curriculum(self) -> bool:
        """Say whether the images changed in the run, or were not the plain run's."""
        return len({kind_of(stage)[1:] for stage in self.stages}) > 1 or self.reference.predicted_cost != 1


def compare_with_measurement(
    plan: Plan, metrics: Sequence[Mapping[str, Any]], *, events: Sequence[Mapping[str, Any]] = ()
) -> Comparison:
    """Hold the plan of a run against the lines of its metrics.jsonl and events.jsonl, stage by stage.

    A line counts for the steps since the line before it. The speed of a stage is the median over its lines, without
    its first when there are more, because that one holds the warm-up of caches, allocators and compilers.

    Raises:
        ValueError: no line was logged before anything froze, so there is nothing to compare with.
    """
    covered: dict[_Kind, int] = {}
    lines: dict[_Kind, list[Mapping[str, Any]]] = {}
    previous, first = 0, plan.stages[0].images
    for line in sorted(metrics, key=lambda line: line["step"]):
        kind = (
            line["frozen_layers"], line.get("img_size", first.img_size), line.get("mask_ratio", first.mask_ratio),
            line.get("decoded_share", first.decoded_share),
        )  # fmt: skip
        covered[kind] = covered.get(kind, 0) + line["step"] - previous
        lines.setdefault(kind, []).append(line)
        previous = line["step"]
    if not is_comparable(metrics):
        raise ValueError("the metrics hold no step before the first freeze, so there is no speed to compare with")
    planned = {kind_of(stage): stage for stage in plan.stages}
    known = [kind for kind in lines if kind in planned]
    dearest = max((kind for kind in known if kind[0] == 0), key=lambda kind: planned[kind].relative_cost)
    plain_speed = median(_speeds(lines[dearest])) * planned[dearest].relative_cost
    found = {
        kind: _compare_stage(planned[kind], lines[kind], steps=covered[kind], plain_speed=plain_speed) for kind in known
    }
    stages = tuple(found.values())
    steps = sum(stage.steps for stage in stages)
    return Comparison(
        stages=stages,
        reference=found[dearest],
        predicted_saving=1 - sum(stage.steps * stage.predicted_cost for stage in stages) / steps,
        measured_saving=1 - sum(stage.steps * stage.measured_cost for stage in stages) / steps,
        freezing_seconds=sum(event.get("seconds", 0.0) for event in events if event["event"] == "freeze"),
    )


def _compare_stage(
    stage: Stage, lines: Sequence[Mapping[str, Any]], *, steps: int, plain_speed: float
) -> StageComparison:
    settled, speeds = _settled(lines), _speeds(lines)
    speed = median(speeds)
    slow, fast = quartiles(speeds)
    return StageComparison(
        frozen_layers=stage.frozen_layers,
        images=stage.images,
        steps=steps,
        images_per_second=speed,
        predicted_cost=stage.relative_cost,
        measured_cost=plain_speed / speed,
        measured_range=(plain_speed / fast, plain_speed / slow),
        data_wait_fraction=sum(line["data_wait_fraction"] for line in settled) / len(settled),
        predicted_state_bytes=stage.optimizer_state_bytes,
        measured_state_bytes=lines[-1]["optimizer_state_bytes"],
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile; those of a single value are the value."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)
    return low, high


def kind_of(stage: Stage | StageComparison) -> _Kind:
    """Return what decides the cost of a stage's steps."""
    images = stage.images
    return stage.frozen_layers, images.img_size, images.mask_ratio, images.decoded_share


def _speeds(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    return [line["images_per_second"] for line in _settled(lines)]


def _settled(lines: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return lines[1:] if len(lines) > 1 else lines


def is_comparable(metrics: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether there is a speed to compare with: a run that went on from elsewhere may begin frozen."""
    return any(line["frozen_layers"] == 0 for line in metrics)


def compare_run(
    config: Config, metrics: Sequence[Mapping[str, Any]], *, events: Sequence[dict[str, Any]] = ()
) -> Comparison:
    """Plan a run for the ranks and the epochs that its metrics tell of, and hold the plan against them."""
    last = metrics[-1]
    steps_per_epoch = round(last["step"] / last["epoch"])
    prediction = plan(config, steps_per_epoch=steps_per_epoch, world_size=last["world_size"], events=events)
    return compare_with_measurement(prediction, metrics, events=events)
