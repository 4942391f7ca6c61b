"""When each layer trains and how fast: FreezeOut's arithmetic, LocalMIM's cosine, adaptive freezing. No torch.

Everything here is a function of the step. A schedule holds numbers computed once from the settings and is
never changed, so every rank, every restart and every world size gets the same answer. The one exception is
`AdaptiveFreezing`, whose answers are a function of the step and of the event log that it keeps.

Sources: A. Brock et al., "FreezeOut", 2017 (t_i and the scaled rates); ViTFreeze, 2024, equations 1 and 2
(warm-up, layers of a ViT); LocalMIM, 2023 (the single cosine with a minimum rate).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

from vitfreeze.architecture import FreezeUnit, active_heads, classifier_units, count_layers, localmim_units
from vitfreeze.config import (
    ArgumentError,
    Config,
    Duration,
    StepCounts,
    check_argument,
    check_run_length,
    count_steps,
)
from vitfreeze.curriculum import Curriculum, ImageStage, build_curriculum
from vitfreeze.extensions import FREEZING, ExtensionError, load_extension

# Below this share of the run a layer trains for less than one step of any run, and base_lr / t_i explodes.
MIN_SHARE = 1e-12


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """LocalMIM's single cosine: a linear warm-up from 0 to `base_lr`, then half a cosine down to `min_lr`.

    Raises:
        ValueError: no steps, a warm-up that fills the run, or a min_lr outside [0, base_lr].
    """

    total_steps: int
    warmup_steps: int
    base_lr: float
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        _check_rates(self)

    def learning_rate(self, step: int) -> float:
        """Return the rate of the optimizer step number `step`, counted from 0."""
        _check_step(step, total_steps=self.total_steps)
        if step < self.warmup_steps:
            return self.base_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + (self.base_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class WsdSchedule:
    """Warm-up, stable, decay: from 0 to `base_lr`, level, and over the last `cooldown_steps` linearly to `min_lr`.

    Until the cooldown begins, nothing depends on where the run ends. Source: Hu et al., "MiniCPM", 2024, section 4.

    Raises:
        ValueError: as CosineSchedule, or a warm-up and a cooldown that are longer than the run.
    """

    total_steps: int
    warmup_steps: int
    cooldown_steps: int
    base_lr: float
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        _check_rates(self)
        longest = self.total_steps - self.warmup_steps
        if not 1 <= self.cooldown_steps <= longest:
            raise ArgumentError("cooldown_steps", self.cooldown_steps, f"1 to {longest} steps")

    @property
    def cooldown_start(self) -> int:
        """The first step of the cooldown, the last with the full rate."""
        return self.total_steps - self.cooldown_steps

    def learning_rate(self, step: int) -> float:
        """Return the rate of the optimizer step number `step`, counted from 0."""
        _check_step(step, total_steps=self.total_steps)
        if step < self.warmup_steps:
            return self.base_lr * step / self.warmup_steps
        if step <= self.cooldown_start:
            return self.base_lr
        return self.min_lr + (self.base_lr - self.min_lr) * (self.total_steps - step) / self.cooldown_steps


def linear(num_layers: int, t_0: float) -> list[float]:
    """Return t_i on a straight line from t_0 at layer 0 to 1 at the last."""
    last = num_layers - 1
    return [t_0 + (1 - t_0) * layer / last for layer in range(last)] + [1.0]


def squared(num_layers: int, t_0: float) -> list[float]:
    """Return the squares of that line."""
    return [share**2 for share in linear(num_layers, t_0)]


def cubic(num_layers: int, t_0: float) -> list[float]:
    """Return the cubes of that line (ViTFreeze's default)."""
    return [share**3 for share in linear(num_layers, t_0)]


@dataclass(frozen=True, kw_only=True)
class FreezeSchedule:
    """FreezeOut on the layers of an encoder: layer i trains for a share t_i of the steps after warm-up.

    t_i runs linearly from t_0 at layer 0 to 1 at the last layer and is then squared, cubed or left as it is
    (`how`; ViTFreeze, equation 1), or is what another registered policy makes it. Over its share the rate of layer i
    falls along half a cosine from its initial rate to 0 (equation 2); the initial rate is base_lr / t_i if `scale_lr`,
    which makes the integral of the rate the same for all layers, else base_lr. During the warm-up, which is not counted
    in the share, it rises linearly from 0.

    With `level` the rate stays at base_lr instead, and falls linearly to 0 over the last `decay_steps` of the share;
    with 0 of them the layer leaves at its full rate.

    Layer i trains through step floor(warmup_steps + t_i * (total_steps - warmup_steps)) and is frozen from
    the next one on. That product is evaluated in float64 in the order of the reference, because a share that
    ends on a whole step in exact arithmetic may end one step earlier in floating point.

    Raises:
        ValueError: t_0 outside (0, 1], an unknown `how`, a warm-up that fills the run, fewer steps than layers.
    """

    num_layers: int
    t_0: float
    how: str
    scale_lr: bool
    total_steps: int
    warmup_steps: int
    base_lr: float
    level: bool = False
    decay_steps: int = 0
    shares: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _decay_steps: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _freeze_steps: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        length, shares = self.total_steps - self.warmup_steps, self._ask_policy()
        ends = (math.floor(self.warmup_steps + share * length) + 1 for share in shares)
        object.__setattr__(self, "shares", shares)
        object.__setattr__(self, "_decay_steps", tuple(share * length for share in shares))
        # A power may round neighbours out of order by one unit in the last place: frozen layers stay a prefix.
        object.__setattr__(self, "_freeze_steps", tuple(accumulate((min(e, self.total_steps) for e in ends), max)))

    def _check(self) -> None:
        if self.num_layers < 2:
            raise ValueError(f"num_layers is {self.num_layers}, but a schedule needs a first and a last layer")
        check_argument("freeze.t_0", self.t_0)
        check_argument("optim.base_lr", self.base_lr)
        check_run_length(total_steps=self.total_steps, warmup_steps=self.warmup_steps)
        if self.total_steps < self.num_layers:
            raise ArgumentError(
                "total_steps", self.total_steps, f"no fewer than the {self.num_layers} layers to schedule"
            )

    def _ask_policy(self) -> tuple[float, ...]:
        """Return every layer's share, as the policy has it."""
        try:
            policy = load_extension(FREEZING, self.how)
        except ExtensionError as error:
            raise ArgumentError("how", self.how, error.allowed) from None
        shares = tuple(policy(self.num_layers, self.t_0))
        if len(shares) != self.num_layers or list(shares) != sorted(shares) or not shares[0] > 0 or shares[-1] != 1:
            allowed = f"a policy that gives {self.num_layers} rising shares above 0, the last of them 1, not {shares}"
            raise ArgumentError("how", self.how, allowed)
        if shares[0] < MIN_SHARE:
            raise ArgumentError("t_0", self.t_0, f"a share that is at least {MIN_SHARE} after {self.how} bends it")
        return shares

    def initial_rate(self, layer: int) -> float:
        """Return the rate that `layer` has at the end of the warm-up, its highest."""
        self._check_layer(layer)
        return self.base_lr / self.shares[layer] if self.scale_lr and not self.level else self.base_lr

    def learning_rate(self, layer: int, step: int) -> float:
        """Return the rate of `layer` in the optimizer step number `step`, counted from 0; 0.0 once frozen.

        Raises:
            ValueError: the layer is not in [0, num_layers), or the step not in [0, total_steps].
        """
        initial = self.initial_rate(layer)
        _check_step(step, total_steps=self.total_steps)
        if step < self.warmup_steps:
            return initial * step / self.warmup_steps
        if self._freeze_steps[layer] <= step:
            return 0.0
        if self.level:
            left = self.warmup_steps + self._decay_steps[layer] - step
            return initial if left >= self.decay_steps else initial * left / self.decay_steps
        return initial * 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / self._decay_steps[layer]))

    def freeze_step(self, layer: int) -> int:
        """Return the first step at which `layer` is frozen; total_steps if it trains to the end."""
        self._check_layer(layer)
        return self._freeze_steps[layer]

    def frozen_layers(self, step: int) -> int:
        """Return the length of the frozen prefix at `step`; the last layer is never in it.

        At step total_steps, the end of the run, it is what it was at the last step.
        """
        _check_step(step, total_steps=self.total_steps)
        return bisect_right(self._freeze_steps, min(step, self.total_steps - 1))

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer} does not exist: the layers are 0 to {self.num_layers - 1}")


def _check_rates(schedule: CosineSchedule | WsdSchedule) -> None:
    check_run_length(total_steps=schedule.total_steps, warmup_steps=schedule.warmup_steps)
    if not 0 <= schedule.min_lr <= schedule.base_lr:
        allowed = f"a number from 0 to the base learning rate {schedule.base_lr:g}"
        raise ArgumentError("min_lr", schedule.min_lr, allowed)


def _check_step(step: int, *, total_steps: int) -> None:
    if not 0 <= step <= total_steps:
        raise ValueError(f"step {step} lies outside the run, whose steps are 0 to {total_steps}")


def interpolate_weights(rows: Sequence[tuple[float, tuple[float, ...]]], *, share_of_run: float) -> tuple[float, ...]:
    """Return the weights of the scales at a share of the run: straight lines between rows, level outside them."""
    after = bisect_right([share for share, _ in rows], share_of_run)
    if after in (0, len(rows)):
        return rows[min(after, len(rows) - 1)][1]
    (left, start), (right, end) = rows[after - 1], rows[after]
    along = (share_of_run - left) / (right - left)
    return tuple(a + (b - a) * along for a, b in zip(start, end, strict=True))


CHECKS_PER_WINDOW = 4
ADAPTIVE_EVENT = "adaptive_check"


def decide_frozen_layers(
    history: Sequence[Sequence[float | None]], *, frozen_layers: int, num_layers: int, threshold: float
) -> int:
    """Return the length of the frozen prefix after looking at a whole window of relative changes.

    `history` holds one row per check of the window, each with the relative change of every layer, or None
    where it was not measured. The prefix grows over every next layer whose change was below `threshold` in
    all rows; it stops at the first that was not, never shrinks, and never takes the last layer.
    """
    prefix = frozen_layers
    while history and prefix < num_layers - 1:
        changes = [row[prefix] for row in history]
        if not all(change is not None and change < threshold for change in changes):
            break
        prefix += 1
    return prefix


@dataclass(frozen=True, kw_only=True)
class AdaptiveCheck:
    """One entry of the event log: what was measured at the start of a step and how long the prefix is from then on.

    `changes` is None if nothing could be measured, as in the first check after a resume between two checks.
    """

    step: int
    changes: tuple[float | None, ...] | None
    frozen_layers: int

    def to_event(self) -> dict[str, Any]:
        """Return the entry as an object for events.jsonl."""
        changes = None if self.changes is None else list(self.changes)
        return {"event": ADAPTIVE_EVENT, "step": self.step, "changes": changes, "frozen_layers": self.frozen_layers}

    @classmethod
    def from_event(cls, event: Mapping[str, Any]) -> AdaptiveCheck:
        """Read the entry back from events.jsonl."""
        changes = None if event["changes"] is None else tuple(event["changes"])
        return cls(step=event["step"], changes=changes, frozen_layers=event["frozen_layers"])


class AdaptiveFreezing:
    """Freezing by measured change: the prefix at a step is a function of the step and of the event log.

    Every `check_every_steps` steps the training loop measures each layer's relative change since the check
    before, the same number on all ranks. A layer joins the prefix when its change was below the threshold in
    CHECKS_PER_WINDOW checks in a row, the last of them at or after `floor_step`. Each check is an event; a
    resumed run is given the events that were logged and follows them instead of deciding again.

    Raises:
        ValueError: fewer than 2 layers, a window shorter than CHECKS_PER_WINDOW steps, or a threshold of 0 or less.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        threshold: float,
        window_steps: int,
        floor_step: int,
        events: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        if num_layers < 2:
            raise ValueError(f"num_layers is {num_layers}, but freezing a prefix needs a first and a last layer")
        check_argument("freeze.adaptive_threshold", threshold, name="threshold")
        if window_steps < CHECKS_PER_WINDOW:
            raise ArgumentError("window_steps", window_steps, f"at least {CHECKS_PER_WINDOW} steps, one for each check")
        self.num_layers = num_layers
        self.threshold = threshold
        self.check_every_steps = window_steps // CHECKS_PER_WINDOW
        self.floor_step = floor_step
        self._log: list[AdaptiveCheck] = []
        for event in events:
            if event.get("event") == ADAPTIVE_EVENT:
                self._append(AdaptiveCheck.from_event(event))

    @property
    def log(self) -> tuple[AdaptiveCheck, ...]:
        """Every check so far, in order of steps."""
        return tuple(self._log)

    def frozen_layers(self, step: int) -> int:
        """Return the length of the frozen prefix at `step` according to the log."""
        position = bisect_right(self._log, step, key=lambda check: check.step)
        return self._log[position - 1].frozen_layers if position else 0

    def check_known(self, step: int) -> None:
        """Make sure that the log says what is frozen at `step`.

        Raises:
            ValueError: it depends on a check that has not been made.
        """
        newest = self._log[-1].step if self._log else 0
        due = (newest // self.check_every_steps + 1) * self.check_every_steps
        if step >= due:
            raise ValueError(
                f"what is frozen at step {step} is not known yet: adaptive freezing measures the layers every "
                f"{self.check_every_steps} steps, the newest check was at step {newest}, and the next is due at {due}"
            )

    def is_check(self, step: int) -> bool:
        """Say whether the layers are to be measured at the start of `step`: a check that the log does not hold yet."""
        due = step > 0 and step % self.check_every_steps == 0
        return due and (not self._log or step > self._log[-1].step)

    def record(self, step: int, *, changes: Sequence[float | None] | None) -> AdaptiveCheck:
        """Decide on what was measured at the start of `step`, keep it in the log, and return it for events.jsonl.

        `changes` holds one relative change per layer, None for a layer that was not measured (a frozen one, or
        a figure that is not finite); None in all if nothing was measured.

        Raises:
            ValueError: it is no check, or the number of changes is not the number of layers.
        """
        if not self.is_check(step):
            raise ValueError(f"step {step} is not a check, or the log already holds it")
        if changes is not None and len(changes) != self.num_layers:
            raise ValueError(f"{len(changes)} changes were given for {self.num_layers} layers")
        finite = None if changes is None else tuple(_finite_or_none(change) for change in changes)
        frozen = self.frozen_layers(step)
        rows = [check.changes for check in self._log if check.changes is not None][-(CHECKS_PER_WINDOW - 1) :]
        if finite is not None and len(rows) == CHECKS_PER_WINDOW - 1 and step >= self.floor_step:
            frozen = decide_frozen_layers(
                [*rows, finite], frozen_layers=frozen, num_layers=self.num_layers, threshold=self.threshold
            )
        check = AdaptiveCheck(step=step, changes=finite, frozen_layers=frozen)
        self._append(check)
        return check

    def _append(self, check: AdaptiveCheck) -> None:
        if self._log and (check.step <= self._log[-1].step or check.frozen_layers < self._log[-1].frozen_layers):
            raise ValueError(f"the event log is out of order at step {check.step}: steps rise and layers stay frozen")
        self._log.append(check)


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    """All that a step of a run needs to know, computed from the settings and the number of the step alone.

    Attributes:
        step: number of the optimizer step, counted from 0.
        frozen_layers: length of the frozen prefix.
        heads: heads of LocalMIM that train, finest first; none in fine-tuning.
        scale_weights: weight of every head's loss, finest first; None: all are 1.
        learning_rates: of every freeze unit by name; 0.0 for frozen ones.
        images: how images are treated.
        ends_stage: the next step freezes more layers, as far as that is known, or treats images otherwise.
    """

    step: int
    frozen_layers: int
    heads: tuple[int, ...]
    scale_weights: tuple[float, ...] | None
    learning_rates: Mapping[str, float]
    images: ImageStage
    ends_stage: bool


@dataclass(frozen=True, kw_only=True)
class RunSchedule:
    """A run as a function of its step.

    With `layers`, encoder layers follow FreezeOut; with `adaptive`, they freeze by measured change. Everything else,
    and every layer of a run with neither, follows `shared`.

    Attributes:
        units: the freeze units of the model, first to freeze first.
        curriculum: how images are treated.
        length: steps of the run as it was planned, of which shares are taken; a cooldown may end it before.
        heads_lr: global: heads follow `shared`; layer: the rate of the layer that they leave with.
        caps_layers: no layer has a higher rate than `shared`.
        least_frozen: layers that were frozen when the run was lengthened, and stay so.
        weight_rows: the weights of the scales' losses, as `loss.scale_weights` gives them.
        layer_decay: factor on the rate from each layer to the one below it (Clark et al., "ELECTRA", ICLR 2020).
    """

    units: tuple[FreezeUnit, ...]
    shared: CosineSchedule | WsdSchedule
    length: int
    curriculum: Curriculum
    layers: FreezeSchedule | None = None
    adaptive: AdaptiveFreezing | None = None
    heads_lr: str = "global"
    caps_layers: bool = False
    least_frozen: int = 0
    weight_rows: tuple[tuple[float, tuple[float, ...]], ...] = ()
    layer_decay: float = 1.0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.shared.total_steps

    @property
    def cooldown_start(self) -> int | None:
        """The last step from which the run can still be lengthened; None if its rates depend on its length."""
        return self.shared.cooldown_start if isinstance(self.shared, WsdSchedule) else None

    @cached_property
    def num_layers(self) -> int:
        """Number of layers that can freeze."""
        return count_layers(self.units)

    def at(self, step: int) -> ScheduledStep:
        """Return everything that the optimizer step number `step`, counted from 0, needs.

        Raises:
            ValueError: the step is not in [0, total_steps], or what is frozen there has not been measured yet.
        """
        _check_step(step, total_steps=self.total_steps)
        if self.adaptive is not None:
            self.adaptive.check_known(step)
        frozen_layers = self.frozen_layers(step)
        images, following = self.curriculum.at(step), min(step + 1, self.total_steps - 1)
        return ScheduledStep(
            step=step,
            frozen_layers=frozen_layers,
            heads=active_heads(self.units, frozen_layers),
            scale_weights=self._scale_weights(step),
            learning_rates={
                unit.name: self.learning_rate(unit, step) if unit.trains(frozen_layers) else 0.0 for unit in self.units
            },
            images=images,
            ends_stage=self.frozen_layers(following) > frozen_layers or self.curriculum.at(following) != images,
        )

    def learning_rate(self, unit: FreezeUnit, step: int) -> float:
        """Return the rate that a unit has at `step` unless adaptive freezing has ended its training."""
        rate = self.shared.learning_rate(step)
        has_own = unit.leaves_with is not None and (unit.layer is not None or self.heads_lr == "layer")
        if self.layers is not None and unit.leaves_with is not None and has_own:
            own = self.layers.learning_rate(unit.leaves_with, step)
            rate = min(rate, own) if self.caps_layers else own
        return rate if unit.layer is None else rate * self.layer_decay ** (self.num_layers - unit.layer)

    def prefix_changes(self) -> tuple[tuple[int, int], ...]:
        """Return (step, frozen_layers from then on) for every step at which the prefix grows; adaptive: so far."""
        if self.layers is not None:
            steps = sorted({self.layers.freeze_step(layer) for layer in range(self.layers.num_layers)})
            found = ((step, self.frozen_layers(step)) for step in steps if step < self.total_steps)
            return tuple((step, frozen) for step, frozen in found if frozen > self.least_frozen)
        changes: list[tuple[int, int]] = []
        for check in self.adaptive.log if self.adaptive is not None else ():
            if check.frozen_layers > (changes[-1][1] if changes else 0):
                changes.append((check.step, check.frozen_layers))
        return tuple(changes)

    def frozen_layers(self, step: int) -> int:
        """Return the length of the frozen prefix at `step`, with adaptive freezing as far as it has been measured."""
        if self.layers is not None:
            return max(self.least_frozen, self.layers.frozen_layers(step))
        return self.adaptive.frozen_layers(step) if self.adaptive is not None else 0

    def _scale_weights(self, step: int) -> tuple[float, ...] | None:
        if not self.weight_rows:
            return None
        weights = interpolate_weights(self.weight_rows, share_of_run=step / self.length)
        return None if all(weight == 1 for weight in weights) else weights


def units_of(config: Config) -> tuple[FreezeUnit, ...]:
    """Return the freeze units of the model that a run trains, first to freeze first."""
    depth, freeze = config.model.resolve().depth, config.freeze
    if config.run.task == "finetune":
        return classifier_units(depth)
    return localmim_units(depth, cls_token=freeze.cls_token, patch_embed=freeze.patch_embed)


def build_schedule(
    config: Config, *, steps_per_epoch: int, events: Iterable[Mapping[str, Any]] = (), least_frozen: int = 0
) -> RunSchedule:
    """Build the schedule of a run from its settings, with all durations converted to steps.

    `events` are the lines of the run's events.jsonl, for freeze.mode adaptive on resume; `least_frozen` layers are
    frozen already, which in a longer run would still train.

    Raises:
        ConfigError: a setting that cannot be used with this many steps.
    """
    steps = count_steps(config, steps_per_epoch=steps_per_epoch)
    size, freeze = config.model.resolve(), config.freeze
    total, warmup = steps.total_steps, steps.warmup_steps
    shared: CosineSchedule | WsdSchedule
    layers, adaptive = None, None
    keys = {"total_steps": "run.length", "min_lr": "optim.min_lr", "t_0": "freeze.t_0", "how": "freeze.how"}
    with config.attribute_errors({**keys, "window_steps": "freeze.adaptive_window"}, steps_per_epoch=steps_per_epoch):
        base_lr, min_lr = config.base_lr, config.optim.min_lr
        if config.optim.schedule == "wsd":
            shared = WsdSchedule(
                total_steps=steps.end_step, warmup_steps=warmup, cooldown_steps=steps.cooldown_steps,
                base_lr=base_lr, min_lr=min_lr,
            )  # fmt: skip
        else:
            shared = CosineSchedule(total_steps=total, warmup_steps=warmup, base_lr=base_lr, min_lr=min_lr)
        if freeze.mode == "schedule":
            layers = FreezeSchedule(
                num_layers=size.num_layers, t_0=freeze.t_0, how=freeze.how, scale_lr=freeze.scale_lr,
                total_steps=total, warmup_steps=warmup, base_lr=config.base_lr, level=freeze.rates != "cosine",
                decay_steps=_count_decay(config, steps) if freeze.rates == "stable" else 0,
            )  # fmt: skip
        elif freeze.mode == "adaptive":
            adaptive = _build_adaptive(config, steps=steps, events=events)
    return RunSchedule(
        units=units_of(config),
        shared=shared,
        length=total,
        curriculum=build_curriculum(config, steps),
        layers=layers,
        adaptive=adaptive,
        heads_lr=freeze.heads_lr,
        caps_layers=freeze.rates == "global" or config.optim.schedule == "wsd",
        least_frozen=least_frozen,
        weight_rows=config.loss.scale_weights,
        layer_decay=config.finetune.layer_decay if config.run.task == "finetune" else 1.0,
    )


def _count_decay(config: Config, steps: StepCounts) -> int:
    decay = config.freeze.decay.to_steps(steps_per_epoch=steps.steps_per_epoch, total_steps=steps.total_steps)
    longest = steps.total_steps - steps.warmup_steps
    if not 1 <= decay <= longest:
        raise config.error("freeze.decay", f"1 to {longest} steps, those after the warm-up; here it is {decay}")
    return decay


def _build_adaptive(config: Config, *, steps: StepCounts, events: Iterable[Mapping[str, Any]]) -> AdaptiveFreezing:
    def count(duration: Duration) -> int:
        return duration.to_steps(steps_per_epoch=steps.steps_per_epoch, total_steps=steps.total_steps)

    freeze, total = config.freeze, steps.total_steps
    window, floor = count(freeze.adaptive_window), count(freeze.adaptive_floor)
    if window > total:
        raise config.error("freeze.adaptive_window", f"at most the {total} steps of the run; here it is {window}")
    if floor >= total:
        raise config.error("freeze.adaptive_floor", f"earlier than the end of the run at step {total}, not at {floor}")
    return AdaptiveFreezing(
        num_layers=config.model.resolve().num_layers, threshold=freeze.adaptive_threshold,
        window_steps=window, floor_step=floor, events=events,
    )  # fmt: skip
