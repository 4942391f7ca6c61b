"""The t_0 that saves a wanted share, and what the authors measured with such settings. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vitfreeze.config import POWERS, Config, ConfigError, CurriculumConfig
from vitfreeze.planner.costs import costs_of
from vitfreeze.planner.measured import StepTimes, relative_cost
from vitfreeze.schedule import FreezeSchedule, build_schedule

IMAGENET_TRAIN_IMAGES = 1_281_167
SMALLEST_T_0 = 0.01


@dataclass(frozen=True, kw_only=True)
class AuthorsResult:
    """Top-1 accuracy of ViT-B after 100 epochs of pre-training and 100 of fine-tuning, as ViTFreeze reports it."""

    how: str
    t_0: float
    scale_lr: bool
    top1: float
    hours: float | None = None  # on one V100


AUTHORS_RESULTS: tuple[AuthorsResult, ...] = (
    AuthorsResult(how="cubic", t_0=0.65, scale_lr=True, top1=79.1),
    AuthorsResult(how="cubic", t_0=0.70, scale_lr=True, top1=80.7),
    AuthorsResult(how="cubic", t_0=0.75, scale_lr=True, top1=81.5),
    AuthorsResult(how="cubic", t_0=0.80, scale_lr=True, top1=82.5, hours=42),
    AuthorsResult(how="cubic", t_0=0.80, scale_lr=False, top1=82.85),
    AuthorsResult(how="cubic", t_0=0.85, scale_lr=True, top1=82.65),
    AuthorsResult(how="cubic", t_0=0.90, scale_lr=True, top1=82.8),
    AuthorsResult(how="linear", t_0=0.50, scale_lr=True, top1=82.5),
)
AUTHORS_MODEL = "vit_base_patch16"
AUTHORS_WITHOUT_FREEZING = AuthorsResult(how="off", t_0=1.0, scale_lr=True, top1=83.2, hours=48)


def describe_authors(config: Config) -> str:
    """Return what the authors measured with the settings of a run, or near them; empty if it is not their model."""
    if not _is_authors_model(config) or config.freeze.mode == "adaptive" or config.optim.schedule != "cosine":
        return ""
    t_0 = 1.0 if config.freeze.mode == "off" else config.freeze.t_0
    has_curriculum = config.curriculum != CurriculumConfig()
    if has_curriculum or (config.freeze.mode == "schedule" and config.freeze.rates != "cosine"):
        return ""
    return find_authors_results(config.freeze.how, t_0=t_0, scale_lr=config.freeze.scale_lr)


def _is_authors_model(config: Config) -> bool:
    return config.model.size == AUTHORS_MODEL and config.run.task == "pretrain"


def find_authors_results(how: str, *, t_0: float, scale_lr: bool) -> str:
    """Return the authors' accuracy at a setting, or at its nearest neighbours below and above."""
    if t_0 == 1:
        return _format_result(AUTHORS_WITHOUT_FREEZING)
    known = [r for r in AUTHORS_RESULTS if r.how == how and r.scale_lr == scale_lr]
    exact = [result for result in known if abs(result.t_0 - t_0) < 1e-6]
    if exact:
        return _format_result(exact[0])
    below = max((r for r in known if r.t_0 < t_0), key=lambda r: r.t_0, default=None)
    above = min((r for r in known if r.t_0 > t_0), key=lambda r: r.t_0, default=AUTHORS_WITHOUT_FREEZING)
    if not known:
        return "not measured by the authors"
    low = _format_result(below) if below else f"not measured by the authors below t_0 {above.t_0:g}"
    return f"{low}; {_format_result(above)}"


def _format_result(result: AuthorsResult) -> str:
    hours = f" in {result.hours:g} V100-hours" if result.hours else ""
    setting = "without freezing" if result.how == "off" else f"at t_0 {result.t_0:g}"
    return f"{result.top1:g} % {setting}{hours}"


@dataclass(frozen=True, kw_only=True)
class Target:
    """The t_0 that reaches a saving with one `how`; None if that cannot be reached."""

    how: str
    t_0: float | None
    saving: float | None
    reachable: float
    authors: str


def count_steps_per_epoch(config: Config, *, images_per_epoch: int) -> int:
    """Return the whole optimizer steps of one epoch; raises ConfigError if there is not one."""
    crops = images_per_epoch * config.data.crops_per_image
    if crops < config.batch.global_size:
        raise config.error("batch.global_size", f"at most one epoch, which has {crops} crops")
    return crops // config.batch.global_size


def solve_targets(
    config: Config,
    *,
    target_saving: float,
    images_per_epoch: int = IMAGENET_TRAIN_IMAGES,
    times: StepTimes | None = None,
) -> tuple[Target, ...]:
    """Find, for each `how`, the largest t_0 (to four decimals) that saves at least `target_saving` of the compute.

    Raises:
        ConfigError: the saving is not in (0, 1), or none reaches it; the message gives the reachable range.
    """
    if not 0 < target_saving < 1:
        raise ConfigError(f"the target saving is {target_saving}, but it must lie strictly between 0 and 1")
    per_epoch = count_steps_per_epoch(config, images_per_epoch=images_per_epoch)
    schedule, costs = build_schedule(config, steps_per_epoch=per_epoch), costs_of(config)
    relative = [relative_cost(k, costs=costs, times=times) for k in range(costs.size.depth + 1)]
    total, warmup = schedule.total_steps, schedule.shared.warmup_steps

    def saving_at(how: str, ten_thousandths: int) -> float:
        layers = FreezeSchedule(
            num_layers=costs.size.num_layers, t_0=ten_thousandths / 10_000, how=how, scale_lr=False,
            total_steps=total, warmup_steps=warmup, base_lr=1.0,
        )  # fmt: skip
        ends = [layers.freeze_step(layer) for layer in range(layers.num_layers)]
        spent = sum((end - start) * cost for start, end, cost in zip([0, *ends], ends, relative, strict=False))
        return 1 - spent / total

    targets = [_solve(config, how, target_saving, saving_at) for how in POWERS]
    if all(target.t_0 is None for target in targets):
        most = max(target.reachable for target in targets)
        raise ConfigError(
            f"a saving of {target_saving:.1%} cannot be reached: with this warm-up and model, t_0 from 1 down to "
            f"{SMALLEST_T_0} saves 0 to {most:.1%}"
        )
    return tuple(targets)


def _solve(config: Config, how: str, target: float, saving_at: Callable[[str, int], float]) -> Target:
    low, high = round(SMALLEST_T_0 * 10_000), 10_000  # saves enough at low if at all, nothing at high
    reachable = saving_at(how, low)
    if reachable < target:
        return Target(how=how, t_0=None, saving=None, reachable=reachable, authors="")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if saving_at(how, middle) >= target else (low, middle)
    t_0 = low / 10_000
    authors = find_authors_results(how, t_0=t_0, scale_lr=config.freeze.scale_lr) if _is_authors_model(config) else ""
    return Target(how=how, t_0=t_0, saving=saving_at(how, low), reachable=reachable, authors=authors)
