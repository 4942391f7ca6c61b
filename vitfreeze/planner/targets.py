"""Settings that fit a run into wanted GPU-hours: t_0, image sizes and epochs are searched. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from vitfreeze.config import Config, ConfigError, CurriculumConfig, Duration, count_steps, overrides_between
from vitfreeze.curriculum import ImageStage
from vitfreeze.extensions import BUILT_IN, FREEZING
from vitfreeze.planner.authors import describe_authors
from vitfreeze.planner.measured import StepTimes
from vitfreeze.planner.prediction import (
    AUTHORS_TERAFLOPS,
    IMAGENET_TRAIN_IMAGES,
    count_steps_per_epoch,
    cut_run,
    describe_timing,
    step_time,
)
from vitfreeze.schedule import build_schedule

# A t_0 is searched in ten-thousandths, the share of small images in hundredths of the run, epochs in tenths.
SMALLEST_T_0, LARGEST_SMALL_SHARE, LARGEST_LENGTHENING = 0.01, 0.9, 10
# Small images are 4/7 and 5/7 of the full side (128 and 160 of 224), the first of them for 6/11 of that time.
SMALL_SIDES, FIRST_OF_SMALL = (4 / 7, 5 / 7), 6 / 11
# How far `together` goes with each means before it takes the next.
MODERATE_SMALL_SHARE, MODERATE_T_0 = 0.55, 0.8


@dataclass(frozen=True, kw_only=True)
class Target:
    """One way to get a run into the wanted GPU-hours.

    Attributes:
        way: in words.
        overrides: `section.key=value` that make it of the recipe; None: it does not lead there.
        gpu_hours: what it takes then; the least that this way reaches if it does not lead there.
        saving: share of the compute time of the recipe's length without freezing and curriculum.
        authors: what the authors measured with such settings, if they did.
    """

    way: str
    overrides: tuple[str, ...] | None
    gpu_hours: float
    saving: float
    authors: str = ""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """All ways, and the one that is chosen: small images first, then freezing, then fewer epochs.

    Each of them goes as far as the target needs it; `plain_gpu_hours` are those of the recipe's length without freezing
    and curriculum.
    """

    recipe: str
    budget_gpu_hours: float
    plain_gpu_hours: float
    timing: str
    ways: tuple[Target, ...]
    chosen: Target


def solve_targets(
    config: Config,
    *,
    target_saving: float | None = None,
    target_gpu_hours: float | None = None,
    images_per_epoch: int = IMAGENET_TRAIN_IMAGES,
    times: StepTimes | None = None,
    teraflops: float = AUTHORS_TERAFLOPS,
) -> Targets:
    """Find the mildest t_0, sizes and epochs whose GPU-hours stay within a target; give one of the two targets.

    Args:
        config: the recipe; a way changes what it is named after and leaves the rest.
        target_saving: share to save of the recipe's length without freezing and curriculum.
        target_gpu_hours: hours of all GPUs together.
        images_per_epoch, times, teraflops: as for `plan`.

    Raises:
        ConfigError: a target that is none, or that no way reaches; the message gives what is reachable.
    """
    search = _Search(
        config=config, times=times, teraflops=teraflops,
        steps_per_epoch=count_steps_per_epoch(config, images_per_epoch=images_per_epoch),
    )  # fmt: skip
    plain = search.hours(without_savings(config))
    if target_saving is not None:
        if not 0 < target_saving < 1:
            raise ConfigError(f"the target saving is {target_saving}, but it must lie strictly between 0 and 1")
        wanted, budget = f"a saving of {target_saving:.1%}", (1 - target_saving) * plain
    else:
        if target_gpu_hours is None or not 0 < target_gpu_hours < float("inf"):
            raise ConfigError(f"the target is {target_gpu_hours} GPU-hours, but it must be a number above 0")
        wanted, budget = f"a run of {target_gpu_hours:g} GPU-hours", target_gpu_hours
    ways = search.find(budget, plain=plain, knows_authors=images_per_epoch == IMAGENET_TRAIN_IMAGES)
    if ways[-1].overrides is None:
        least = min(way.gpu_hours for way in ways)
        raise ConfigError(
            f"{wanted} cannot be reached: the settings that are searched take at least {least:.3g} of {plain:.3g} "
            "GPU-hours"
        )
    return Targets(
        recipe=config.recipe, budget_gpu_hours=budget, plain_gpu_hours=plain, ways=ways,
        chosen=ways[-1], timing=describe_timing(times, teraflops),
    )  # fmt: skip


def without_savings(config: Config) -> Config:
    """Return the run without freezing and curriculum."""
    return replace(config, freeze=replace(config.freeze, mode="off"), curriculum=CurriculumConfig())


def with_freezing(config: Config, how: str, t_0: float) -> Config:
    """Return the run with FreezeOut; where its rates do not go with optim.schedule, all layers follow that."""
    rates = config.freeze.rates
    if config.optim.schedule == "wsd" and rates == "cosine":
        rates = "global"
    return replace(config, freeze=replace(config.freeze, mode="schedule", how=how, t_0=t_0, rates=rates))


def with_small_images(config: Config, share: float) -> Config:
    """Return the run with small images for a share of it, in two sizes where grid and heads allow two."""
    full, least = config.model.img_size, 2 * config.model.resolve().patch_size
    sides = sorted({max(least, least * round(full * part / least)) for part in SMALL_SIDES} - {full})
    begins = [0.0, round(FIRST_OF_SMALL * share, 2)][: len(sides)]
    stages = dict(zip([*begins, share], [*sides, full], strict=True)) if share else {}
    img_size = tuple((Duration(begin, "fraction"), float(side)) for begin, side in stages.items())
    return replace(config, curriculum=replace(config.curriculum, img_size=img_size))


@dataclass(frozen=True, kw_only=True)
class _Search:
    """One search; what a step costs is computed once for every kind of step."""

    config: Config
    times: StepTimes | None
    teraflops: float
    steps_per_epoch: int
    _known: dict[tuple[int, float, float, int], float] = field(default_factory=dict)

    def hours(self, config: Config) -> float:
        """GPU-hours of a run; one that its settings do not allow, as it is too short, takes none."""
        try:
            schedule = build_schedule(config, steps_per_epoch=self.steps_per_epoch)
        except ConfigError:
            return 0.0
        return (
            sum(
                (stretch.end_step - stretch.first_step)
                * self._milliseconds(config, stretch.images, stretch.frozen_layers)
                for stretch in cut_run(schedule)
            )
            / 3.6e6
        )

    def _milliseconds(self, config: Config, images: ImageStage, frozen: int) -> float:
        key = (images.img_size, images.mask_ratio, images.decoded_share, frozen)
        if key not in self._known:
            _, self._known[key] = step_time(
                config, images, frozen_layers=frozen, times=self.times, teraflops=self.teraflops
            )  # fmt: skip
        return self._known[key]

    def find(self, budget: float, *, plain: float, knows_authors: bool) -> tuple[Target, ...]:
        """Try every way for a budget of GPU-hours; the combined one comes last."""
        config, unsaving = self.config, without_savings(self.config)
        found = {
            **{f"freezing, {how}": self.freeze(config, how, budget, SMALLEST_T_0) for how in BUILT_IN[FREEZING]},
            "small images first": self.shrink(config, budget, LARGEST_SMALL_SHARE),
            "other length": self.lengthen(config, budget),
            "plain, other length": self.lengthen(unsaving, budget),
            "together": self.combine(unsaving, budget),
        }
        ways = []
        for way, variant in found.items():
            hours = self.hours(variant)
            reached = 0 < hours <= budget
            ways.append(
                Target(
                    way=way, overrides=tuple(overrides_between(config, variant)) if reached else None,
                    gpu_hours=hours, saving=1 - hours / plain,
                    authors=describe_authors(variant) if reached and knows_authors else "",
                )
            )  # fmt: skip
        return tuple(ways)

    def combine(self, unsaving: Config, budget: float) -> Config:
        """Return a run with small images, then freezing, then fewer epochs, as far as needed; or with more."""
        if self.hours(unsaving) <= budget:
            return self.lengthen(unsaving, budget)
        variant = self.shrink(unsaving, budget, MODERATE_SMALL_SHARE)
        if self.hours(variant) > budget:
            variant = self.freeze(variant, self.config.freeze.how, budget, MODERATE_T_0)
        return self.lengthen(variant, budget) if not 0 < self.hours(variant) <= budget else variant

    def freeze(self, config: Config, how: str, budget: float, least: float) -> Config:
        """Return the run with the largest t_0 that fits, or with the least."""
        return self._largest(lambda k: with_freezing(config, how, k / 10_000), round(10_000 * least), 10_000, budget)

    def shrink(self, config: Config, budget: float, most: float) -> Config:
        """Return the run with small images for the shortest share that fits, or for the longest."""
        return self._largest(lambda k: with_small_images(config, -k / 100), -round(100 * most), 0, budget)

    def lengthen(self, config: Config, budget: float) -> Config:
        """Return the run with the most epochs that fit; its warm-up keeps its share."""
        length, unit = config.run.length, 10 if config.run.length.unit == "epochs" else 1
        steps = count_steps(config, steps_per_epoch=self.steps_per_epoch)
        optim = replace(config.optim, warmup=Duration(round(steps.warmup_steps / steps.total_steps, 4), "fraction"))
        longest = round(LARGEST_LENGTHENING * length.value * unit)

        def make(count: int) -> Config:
            changed = replace(length, value=count / unit)
            return (
                replace(config, optim=optim, run=replace(config.run, length=changed)) if changed != length else config
            )

        return self._largest(make, 1, longest, budget)

    def _largest(self, make: Callable[[int], Config], low: int, high: int, budget: float) -> Config:
        """Return the run of the largest number that fits; cost rises with the number; that of `low` if none fits."""
        if self.hours(make(high)) <= budget:
            return make(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.hours(make(middle)) <= budget else (low, middle)
        return make(low)
