"""What the images of a step are: their size, how much is masked, and how much of that reconstructed. No torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vitfreeze.architecture import count_decoded, count_visible
from vitfreeze.config import Config, ConfigError, Duration, StepCounts

KEYS = ("img_size", "mask_ratio", "decoded_share")


@dataclass(frozen=True, kw_only=True)
class ImageStage:
    """A stretch of the run in which all images are treated alike.

    Attributes:
        first_step: the step that it begins with.
        img_size: side of the images in pixels.
        mask_ratio: share of the patches that the encoder does not see.
        decoded_share: share of those that the heads reconstruct, other ones for every crop.
        shards: which stage of `data.train` they are read from, counted from the end: -1 is the last.
    """

    first_step: int
    img_size: int
    mask_ratio: float
    decoded_share: float = 1.0
    shards: int = -1


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run, in order; the first begins at step 0."""

    stages: tuple[ImageStage, ...]

    def at(self, step: int) -> ImageStage:
        """Return the stage that a step belongs to."""
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1]


def plain_stage(config: Config) -> ImageStage:
    """Return how images are treated without a curriculum."""
    return ImageStage(first_step=0, img_size=config.model.img_size, mask_ratio=config.model.mask_ratio)


def build_curriculum(config: Config, steps: StepCounts) -> Curriculum:
    """Return the stages that `curriculum.*` and `data.train` ask for.

    Raises:
        ConfigError: stages that are out of order in this many steps, or with no patch to see or to reconstruct.
    """
    plain = plain_stage(config)
    values: dict[str, dict[int, float]] = {
        key: dict(_count(config, f"curriculum.{key}", getattr(config.curriculum, key), steps))
        or {0: getattr(plain, key)}
        for key in KEYS
    }
    begins = [begin for begin, _ in config.data.train_stages]
    numbered = [(begin, number - len(begins)) for number, begin in enumerate(begins)]
    values["shards"] = dict(_count(config, "data.train", numbered, steps))
    stages = []
    for first in sorted(set().union(*values.values())):
        img_size, mask_ratio, decoded_share, shards = (
            [value for begin, value in by_step.items() if begin <= first][-1] for by_step in values.values()
        )
        stage = ImageStage(
            first_step=first, img_size=int(img_size), mask_ratio=mask_ratio, decoded_share=decoded_share,
            shards=int(shards),
        )  # fmt: skip
        _check(config, stage)
        stages.append(stage)
    return Curriculum(tuple(stages))


def _count(
    config: Config, key: str, stages: Iterable[tuple[Duration, float]], steps: StepCounts
) -> Iterator[tuple[int, float]]:
    """Yield (first step, value) of each stage of a setting."""
    last = -1
    for begin, value in stages:
        first = begin.to_steps(steps_per_epoch=steps.steps_per_epoch, total_steps=steps.total_steps)
        if not last < first < steps.total_steps:
            raise config.error(
                key,
                f"stages that begin one after another in the {steps.total_steps} steps of the run; {begin} is step "
                f"{first}" + (f", behind {last}" if last >= 0 else ""),
            )
        yield first, value
        last = first


def _check(config: Config, stage: ImageStage) -> None:
    patches = (stage.img_size // config.model.resolve().patch_size) ** 2
    visible = count_visible(patches, stage.mask_ratio)
    if not 0 < visible < patches:
        raise _refuse(config, "mask_ratio", f"{visible} of {patches} patches visible", stage)
    if not count_decoded(patches - visible, stage.decoded_share):
        raise _refuse(config, "decoded_share", f"none of {patches - visible} masked patches to reconstruct", stage)


def _refuse(config: Config, key: str, what: str, stage: ImageStage) -> ConfigError:
    where = f"from step {stage.first_step} on, {getattr(stage, key):g} at {stage.img_size} pixels leaves {what}"
    return config.error(
        f"curriculum.{key}" if getattr(config.curriculum, key) else f"model.{key}",
        f"at least one patch of each; {where}",
    )
