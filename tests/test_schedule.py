"""The schedule against the paper's figures, and the rules that hold for every setting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfreeze.config import Config, ConfigError, build_config
from vitfreeze.extensions import BUILT_IN, FREEZING
from vitfreeze.schedule import (
    CHECKS_PER_WINDOW,
    AdaptiveFreezing,
    CosineSchedule,
    FreezeSchedule,
    WsdSchedule,
    build_schedule,
    decide_frozen_layers,
    interpolate_weights,
    localmim_units,
)

HOWS = sorted(BUILT_IN[FREEZING])
PAPER = {"num_layers": 13, "t_0": 0.8, "how": "cubic", "scale_lr": True, "base_lr": 1e-3}


def make(**changes: Any) -> FreezeSchedule:
    return FreezeSchedule(**{**PAPER, "total_steps": 1000, "warmup_steps": 100, **changes})


def configure(**values: Any) -> Config:
    return build_config({key.replace("__", "."): (value, "a test") for key, value in values.items()}, recipe="test")


@st.composite
def schedules(draw: st.DrawFn) -> FreezeSchedule:
    num_layers = draw(st.integers(2, 40))
    total_steps = draw(st.integers(num_layers, 5000))
    return FreezeSchedule(
        num_layers=num_layers,
        t_0=draw(st.one_of(st.floats(0.01, 1), st.sampled_from([0.5, 0.7, 0.75, 0.8, 0.9, 1.0]))),
        how=draw(st.sampled_from(HOWS)),
        scale_lr=draw(st.booleans()),
        total_steps=total_steps,
        warmup_steps=draw(st.integers(0, total_steps - 1)),
        base_lr=draw(st.floats(1e-6, 1.0)),
    )


@pytest.fixture(params=range(4))
def reference(request: pytest.FixtureRequest, shared_dir: Path) -> tuple[FreezeSchedule, dict[str, Any]]:
    case = json.loads((shared_dir / "reference" / "freezeout_schedules.json").read_text())[request.param]
    schedule = FreezeSchedule(
        num_layers=case["layers"],
        t_0=case["t0"],
        **{key: case[key] for key in ("how", "scale_lr", "total_steps", "warmup_steps", "base_lr")},
    )
    return schedule, case


def test_rates_equal_the_reference(reference: tuple[FreezeSchedule, dict[str, Any]]) -> None:
    schedule, case = reference
    for step, rates in case["lr_by_step"].items():
        for layer, rate in enumerate(rates):
            assert schedule.learning_rate(layer, int(step)) == pytest.approx(rate, rel=1e-12, abs=0), (layer, step)


def test_layers_freeze_when_the_reference_says(reference: tuple[FreezeSchedule, dict[str, Any]]) -> None:
    schedule, case = reference
    assert schedule.shares == pytest.approx(case["t"], rel=1e-12, abs=0)
    for layer, last_step in enumerate(case["freeze_after_step"]):
        frozen_from = min(math.floor(last_step) + 1, case["total_steps"])
        assert schedule.freeze_step(layer) == frozen_from
        assert schedule.frozen_layers(frozen_from - 1) <= layer
        if frozen_from < case["total_steps"]:
            assert schedule.frozen_layers(frozen_from) > layer


@given(schedules(), st.data())
def test_frozen_layers_never_falls(schedule: FreezeSchedule, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, schedule.total_steps))
    second = data.draw(st.integers(first, schedule.total_steps))
    assert schedule.frozen_layers(first) <= schedule.frozen_layers(second) < schedule.num_layers


@given(schedules())
def test_last_layer_trains_to_the_end(schedule: FreezeSchedule) -> None:
    last = schedule.num_layers - 1
    assert schedule.freeze_step(last) == schedule.total_steps
    assert schedule.frozen_layers(schedule.total_steps - 1) <= last
    if schedule.total_steps - 1 > schedule.warmup_steps or schedule.warmup_steps == 0:
        assert schedule.learning_rate(last, schedule.total_steps - 1) > 0


@given(schedules(), st.data())
def test_a_layer_has_no_rate_exactly_when_it_is_frozen(schedule: FreezeSchedule, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, schedule.num_layers - 1))
    step = data.draw(st.integers(0, schedule.total_steps - 1))
    frozen = layer < schedule.frozen_layers(step)
    assert frozen == (step >= schedule.freeze_step(layer))
    rate = schedule.learning_rate(layer, step)
    if frozen:
        assert rate == 0.0
    else:
        assert 0 <= rate <= schedule.initial_rate(layer) * (1 + 1e-15)


@given(schedules(), st.data())
def test_rates_are_continuous_at_the_end_of_warmup(schedule: FreezeSchedule, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, schedule.num_layers - 1))
    warmup, initial = schedule.warmup_steps, schedule.initial_rate(layer)
    assert schedule.learning_rate(layer, warmup) == pytest.approx(initial, rel=1e-12)
    if warmup:
        before = schedule.learning_rate(layer, warmup - 1)
        assert initial - before == pytest.approx(initial / warmup, rel=1e-9)


@settings(max_examples=25)
@given(st.sampled_from([2, 5, 13, 25]), st.floats(0.3, 1), st.sampled_from(HOWS), st.floats(1e-5, 1))
def test_scaled_layers_travel_alike(num_layers: int, t_0: float, how: str, base_lr: float) -> None:
    schedule = make(
        num_layers=num_layers, t_0=t_0, how=how, base_lr=base_lr, total_steps=20_000, warmup_steps=0, scale_lr=True
    )
    for layer in (0, num_layers // 2, num_layers - 1):
        rates = [schedule.learning_rate(layer, step) for step in range(schedule.freeze_step(layer))]
        # The trapezium rule: the sum over whole steps counts half of the first rate too much.
        integral = sum(rates) - rates[0] / 2
        assert integral == pytest.approx(base_lr * 20_000 / 2, rel=1e-3)


def test_unscaled_layers_do_not_travel_alike() -> None:
    schedule = make(scale_lr=False, warmup_steps=0)
    travelled = [sum(schedule.learning_rate(layer, step) for step in range(1000)) for layer in (0, 12)]
    assert travelled[0] == pytest.approx(0.512 * travelled[1], rel=1e-2)


def test_a_share_that_ends_on_a_whole_step_trains_through_it() -> None:
    schedule = make(t_0=0.5, how="linear", num_layers=3, total_steps=100, warmup_steps=0)
    assert schedule.freeze_step(0) == 51
    assert schedule.frozen_layers(50) == 0
    assert schedule.learning_rate(0, 50) == 0.0
    assert schedule.frozen_layers(51) == 1


@pytest.mark.parametrize("how", HOWS)
def test_t_0_of_one_freezes_nothing(how: str) -> None:
    schedule = make(t_0=1, how=how)
    assert schedule.frozen_layers(1000) == 0
    cosine = CosineSchedule(total_steps=1000, warmup_steps=100, base_lr=1e-3)
    for step in (0, 7, 100, 500, 999):
        for layer in (0, 12):
            assert schedule.learning_rate(layer, step) == pytest.approx(cosine.learning_rate(step), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"t_0": 0}, "t_0 is 0"),
        ({"t_0": -0.1}, "t_0 is -0.1"),
        ({"t_0": 1.5}, r"a number in \(0, 1\]"),
        ({"t_0": float("nan")}, "t_0 is nan"),
        ({"t_0": 1e-9}, "cubic bends"),
        ({"how": "quartic"}, "one of linear, squared, cubic"),
        ({"warmup_steps": 1001}, "0 to 999 steps"),
        ({"warmup_steps": 1000}, "0 to 999 steps"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"total_steps": 12, "warmup_steps": 0}, "fewer than the 13 layers"),
        ({"total_steps": 0, "warmup_steps": 0}, "at least 1 step"),
        ({"num_layers": 1}, "num_layers is 1"),
        ({"base_lr": -1.0}, "base_lr is -1.0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


def test_questions_outside_the_run_are_refused() -> None:
    schedule = make()
    for layer, step in ((13, 0), (-1, 0), (0, -1), (0, 1001)):
        with pytest.raises(ValueError, match=r"does not exist|outside the run"):
            schedule.learning_rate(layer, step)
    with pytest.raises(ValueError, match="outside the run"):
        schedule.frozen_layers(-1)


def test_cosine_has_warmup_and_minimum() -> None:
    cosine = CosineSchedule(total_steps=110, warmup_steps=10, base_lr=1.0, min_lr=0.2)
    assert [cosine.learning_rate(step) for step in (0, 5, 10, 60)] == pytest.approx([0, 0.5, 1, 0.6], abs=1e-15)
    assert cosine.learning_rate(110) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="min_lr is 2"):
        CosineSchedule(total_steps=110, warmup_steps=10, base_lr=1.0, min_lr=2)


def test_units_hold_every_layer_and_head_once_first_to_freeze_first() -> None:
    units = localmim_units(12)
    assert [unit.name for unit in units][:4] == ["layer_00", "layer_01", "layer_02", "head_0"]
    assert [unit.name for unit in units][-6:] == ["layer_09", "layer_10", "head_2", "layer_11", "layer_12", "head_3"]
    assert len(units) == 13 + 4
    apart = localmim_units(12, cls_token=False)
    assert (apart[-1].name, apart[-1].leaves_with) == ("cls_token", None)
    assert apart[:-1] == units
    # With neither parameter in it there is no layer 0 to drop.
    assert {unit.name for unit in localmim_units(12, cls_token=False, patch_embed=False)} >= {
        "cls_token",
        "patch_embed",
    }
    assert "layer_00" not in {unit.name for unit in localmim_units(12, cls_token=False, patch_embed=False)}


def test_the_run_gives_every_unit_its_rate() -> None:
    run = build_schedule(configure(), steps_per_epoch=625)
    assert run.layers is not None
    step = run.layers.freeze_step(4)
    rates = run.at(step).learning_rates
    assert set(rates) == {unit.name for unit in run.units}
    assert run.at(step).frozen_layers == 5
    assert run.at(step).heads == (2, 3)
    assert [rates[name] for name in ("layer_04", "head_1", "head_0", "layer_00")] == [0.0] * 4
    assert rates["layer_05"] == run.layers.learning_rate(5, step) > 0
    assert rates["head_2"] == rates["head_3"] == run.shared.learning_rate(step)
    # The head of the tap that has not frozen yet goes on with the layers before it frozen.
    assert run.at(step - 1).learning_rates["head_1"] == run.shared.learning_rate(step - 1)


def test_heads_may_follow_their_layer() -> None:
    run = build_schedule(configure(freeze__heads_lr="layer"), steps_per_epoch=625)
    rates = run.at(9000).learning_rates
    assert rates["head_0"] == rates["layer_02"]
    assert rates["head_3"] == rates["layer_12"]
    assert rates["head_0"] > rates["head_3"]


def test_parameters_kept_out_of_layer_0_train_to_the_end() -> None:
    run = build_schedule(configure(freeze__cls_token=False, freeze__patch_embed=False), steps_per_epoch=625)
    last = run.total_steps - 1
    rates = run.at(last).learning_rates
    assert rates["cls_token"] == rates["patch_embed"] == run.shared.learning_rate(last) > 0


def test_mode_off_is_one_cosine_for_everything() -> None:
    run = build_schedule(configure(freeze__mode="off", optim__min_lr=1e-5), steps_per_epoch=625)
    for step in (0, 3000, 6250, 40000, 62499):
        assert set(run.at(step).learning_rates.values()) == {run.shared.learning_rate(step)}
        assert run.at(step).frozen_layers == 0
    assert run.at(run.total_steps).learning_rates["layer_00"] == pytest.approx(1e-5)


@pytest.mark.parametrize("warmup", ["6250 steps", "10 epochs", 0.1, "10%"])
def test_warmup_may_be_given_in_steps_epochs_or_a_fraction(warmup: object) -> None:
    run = build_schedule(configure(optim__warmup=warmup), steps_per_epoch=625)
    assert run.shared.warmup_steps == 6250
    assert run.layers is not None
    assert run.layers.warmup_steps == 6250


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optim__warmup": "200 epochs"}, r"optim.warmup is '200 epochs'.*set in a test"),
        ({"run__length": "12 steps", "optim__warmup": 0}, "run.length is '12 steps'.*13 layers"),
        ({"optim__min_lr": 1.0}, "optim.min_lr is 1.0.*base learning rate 0.0016"),
        ({"freeze__t_0": 1e-9}, "freeze.t_0 is 1e-09"),
        ({"freeze__mode": "adaptive", "freeze__adaptive_window": "3 steps"}, "adaptive_window.*at least 4 steps"),
        ({"freeze__mode": "adaptive", "freeze__adaptive_floor": 1.0}, "adaptive_floor.*62500"),
        ({"freeze__mode": "adaptive", "freeze__adaptive_threshold": 0}, "adaptive_threshold.*above 0"),
    ],
)
def test_a_recipe_that_cannot_be_scheduled_says_where_it_was_set(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_schedule(configure(**values), steps_per_epoch=625)


def test_scale_weights_follow_straight_lines() -> None:
    rows = ((0.2, (1.0, 1.0, 1.0, 1.0)), (0.6, (0.0, 1.0, 2.0, 1.0)))
    assert interpolate_weights(rows, share_of_run=0.0) == (1, 1, 1, 1)
    assert interpolate_weights(rows, share_of_run=0.4) == pytest.approx((0.5, 1, 1.5, 1))
    assert interpolate_weights(rows, share_of_run=0.9) == (0, 1, 2, 1)
    run = build_schedule(configure(loss__scale_weights=[[0.5, [1, 1, 1, 1]], [1, [3, 1, 1, 1]]]), steps_per_epoch=625)
    assert run.at(0).scale_weights is None
    assert run.at(46875).scale_weights == pytest.approx((2, 1, 1, 1))
    assert build_schedule(configure(), steps_per_epoch=625).at(46875).scale_weights is None


# Adaptive freezing ----------------------------------------------------------------------------------------------------


def adaptive(events: Any = (), **changes: Any) -> AdaptiveFreezing:
    given = {"num_layers": 4, "threshold": 0.1, "window_steps": 8, "floor_step": 0, **changes}
    return AdaptiveFreezing(**given, events=events)


def follow(freezing: AdaptiveFreezing, figures: dict[int, list[float | None] | None], *, stop: int) -> list[int]:
    """Run the steps before `stop` as the training loop does; returns frozen_layers at each."""
    frozen = []
    for step in range(stop):
        if freezing.is_check(step):
            freezing.record(step, changes=figures[step])
        frozen.append(freezing.frozen_layers(step))
    return frozen


def test_decision_takes_the_longest_calm_prefix() -> None:
    calm, loud = [0.01] * 5, [0.01, 0.01, 0.5, 0.01, 0.01]

    def decide(*history: list[float], frozen: int = 0) -> int:
        return decide_frozen_layers(history, frozen_layers=frozen, num_layers=5, threshold=0.1)

    assert decide(calm, loud) == 2  # layer 3 is calm too, but layer 2 before it is not
    assert decide(calm, calm) == 4  # never the last layer
    assert decide([0.5] * 5, frozen=3) == 3  # never shrinks
    assert decide([0.1] * 5) == 0  # below, not at, the threshold
    assert decide() == 0


def test_a_layer_must_stay_calm_for_the_whole_window() -> None:
    calm: list[float | None] = [0.01, 0.2, 0.2, 0.2]
    figures = dict.fromkeys(range(2, 40, 2), calm)
    frozen = follow(adaptive(), figures, stop=30)
    assert frozen[7] == 0
    assert frozen[8:] == [1] * 22  # four checks, at 2, 4, 6 and 8
    figures[6] = [0.3, 0.2, 0.2, 0.2]
    frozen = follow(adaptive(), figures, stop=30)
    assert frozen[13] == 0
    assert frozen[14] == 1  # the count starts anew after the unrest at 6


def test_nothing_freezes_before_the_floor() -> None:
    figures: dict[int, list[float | None] | None] = {step: [0.01] * 4 for step in range(2, 40, 2)}
    frozen = follow(adaptive(floor_step=21), figures, stop=30)
    assert frozen[21] == 0
    assert frozen[22] == 3


def test_figures_that_are_missing_or_not_finite_freeze_nothing() -> None:
    for bad in (None, math.nan, math.inf):
        figures: dict[int, list[float | None] | None] = {step: [bad, 0.01, 0.01, 0.01] for step in range(2, 40, 2)}
        assert follow(adaptive(), figures, stop=30)[-1] == 0


changes_strategy = st.lists(st.one_of(st.none(), st.floats(0, 0.3)), min_size=4, max_size=4)


@given(st.lists(st.one_of(st.none(), changes_strategy), min_size=20, max_size=20), st.integers(0, 40))
def test_a_resume_replays_the_decisions_of_the_log(rows: list[list[float | None] | None], resume_at: int) -> None:
    figures = {2 * (index + 1): row for index, row in enumerate(rows)}
    whole = adaptive()
    frozen = follow(whole, figures, stop=41)
    assert frozen == sorted(frozen)
    assert frozen[-1] < 4
    # The log travels through JSON lines, among events of other kinds.
    lines = [json.dumps({"event": "save", "step": 1}), *(json.dumps(check.to_event()) for check in whole.log)]
    assert "NaN" not in "".join(lines)
    kept = [event for event in map(json.loads, lines) if event["step"] <= resume_at]
    resumed = adaptive(kept)
    assert follow(resumed, figures, stop=41)[: resume_at + 1] == frozen[: resume_at + 1]
    assert resumed.log == whole.log

    # Steps that were lost between the checkpoint and the crash are in the log: their decisions stand, whatever a
    # second measurement would say.
    replayed = adaptive(map(json.loads, lines))
    assert not any(replayed.is_check(step) for step in range(41))
    assert [replayed.frozen_layers(step) for step in range(41)] == frozen


def test_a_log_out_of_order_is_refused() -> None:
    adaptive_log = adaptive_with_one_frozen()
    events = [check.to_event() for check in adaptive_log.log]
    with pytest.raises(ValueError, match="out of order"):
        adaptive(reversed(events))
    with pytest.raises(ValueError, match="not a check"):
        adaptive_log.record(2, changes=None)
    with pytest.raises(ValueError, match="3 changes were given for 4 layers"):
        adaptive_log.record(10, changes=[0.1] * 3)


def adaptive_with_one_frozen() -> AdaptiveFreezing:
    freezing = adaptive()
    follow(freezing, {step: [0.01, 1.0, 1.0, 1.0] for step in (2, 4, 6, 8)}, stop=9)
    assert freezing.frozen_layers(8) == 1
    return freezing


def test_adaptive_run_follows_the_cosine_until_it_freezes() -> None:
    config = configure(freeze__mode="adaptive", freeze__adaptive_floor=0)
    run = build_schedule(config, steps_per_epoch=625)
    assert run.adaptive is not None
    every = run.adaptive.check_every_steps
    assert every * CHECKS_PER_WINDOW == 1248  # 2 % of 62500 steps, in whole checks
    for check in range(1, CHECKS_PER_WINDOW + 1):
        run.adaptive.record(check * every, changes=[1e-4] * 3 + [1.0] * 10)
    step = CHECKS_PER_WINDOW * every
    assert run.at(step - 1).frozen_layers == 0
    assert run.at(step).frozen_layers == 3
    rates = run.at(step).learning_rates
    assert rates["layer_02"] == rates["head_0"] == 0.0
    assert rates["layer_03"] == rates["head_1"] == run.shared.learning_rate(step)
    events = [check.to_event() for check in run.adaptive.log]
    assert build_schedule(config, steps_per_epoch=625, events=events).at(step).learning_rates == rates


@pytest.mark.parametrize("depth", [4, 5, 6, 7, 12, 24])
def test_every_head_is_a_unit(depth: int) -> None:
    names = [unit.name for unit in localmim_units(depth)]
    assert sorted(names) == sorted([f"head_{k}" for k in range(4)] + [f"layer_{i:02d}" for i in range(depth + 1)])


WSD = {"optim__schedule": "wsd", "optim__cooldown": "100 steps", "run__length": "1000 steps", "optim__warmup": 0.1}


def rates_of(step: int, **values: Any) -> Any:
    base = {"optim__blr": None, "optim__base_lr": 1.0, "freeze__how": "linear", "freeze__t_0": 0.5}
    return build_schedule(configure(**{**base, **values}), steps_per_epoch=10).at(step).learning_rates


def test_wsd_is_level_until_its_cooldown() -> None:
    wsd = WsdSchedule(total_steps=100, warmup_steps=10, cooldown_steps=20, base_lr=1.0, min_lr=0.5)
    assert [wsd.learning_rate(step) for step in (0, 5, 10, 79, 80, 90, 100)] == [0, 0.5, 1, 1, 1, 0.75, 0.5]
    with pytest.raises(ValueError, match="cooldown_steps is 91, expected 1 to 90 steps"):
        WsdSchedule(total_steps=100, warmup_steps=10, cooldown_steps=91, base_lr=1.0)


def test_before_its_cooldown_wsd_does_not_know_the_length_of_the_run() -> None:
    values = {**WSD, "freeze__mode": "off", "optim__warmup": "100 steps"}
    for step in (0, 50, 100, 500, 900):
        assert rates_of(step, **{**values, "run__length": "2000 steps"}) == rates_of(step, **values)


def test_global_rates_are_one_schedule_until_a_layer_leaves() -> None:
    values = {"freeze__rates": "global", "run__length": "1000 steps", "optim__warmup": 0.1, "optim__min_lr": 1e-4}
    run = build_schedule(configure(**values), steps_per_epoch=10)
    assert run.layers is not None
    for step in (0, 50, 100, 560, 999):
        frozen = run.at(step).frozen_layers
        for unit in run.units:
            expected = run.shared.learning_rate(step) if unit.trains(frozen) else 0.0
            assert run.at(step).learning_rates[unit.name] == expected
    assert run.at(999).frozen_layers == 12


def test_stable_rates_are_level_and_decay_before_each_layer_leaves() -> None:
    values = {"freeze__rates": "stable", "freeze__decay": "90 steps", "run__length": "1000 steps", "optim__warmup": 0.1}
    # Layer 0 trains for half of the 900 steps after the warm-up: through step 550.
    seen = [rates_of(step, **values)["layer_00"] for step in (50, 100, 460, 505, 541, 550, 551)]
    assert seen == [0.5, 1.0, 1.0, 0.5, 0.1, 0.0, 0.0]
    assert [rates_of(step, **values)["layer_12"] for step in (551, 910, 955)] == [1.0, 1.0, 0.5]
    assert rates_of(550, **values)["head_3"] == 0.5  # cosine, half-way


def test_no_layer_is_faster_than_wsd() -> None:
    values = {**WSD, "freeze__rates": "stable", "freeze__decay": "45 steps"}
    assert [rates_of(step, **values)["layer_12"] for step in (900, 950, 975, 1000)] == [1.0, 0.5, 0.25, 0.0]
    assert rates_of(550, **values)["layer_00"] == 0.0


def test_a_cooldown_from_an_earlier_step_ends_the_run_and_changes_nothing_before() -> None:
    values = {**WSD, "freeze__rates": "global", "freeze__how": "linear", "freeze__t_0": 0.5}
    whole = build_schedule(configure(**values), steps_per_epoch=10)
    cooled = build_schedule(configure(**values, optim__cooldown_from="600 steps"), steps_per_epoch=10)
    assert cooled.total_steps == 700
    assert all(cooled.at(step) == whole.at(step) for step in (0, 99, 551, 600))
    assert cooled.at(650).frozen_layers == whole.at(650).frozen_layers == 3
    assert cooled.at(650).learning_rates["layer_12"] == 0.5 * whole.at(650).learning_rates["layer_12"]
    assert cooled.at(700).learning_rates["layer_12"] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**WSD}, r"freeze.rates is 'cosine'; allowed: global or stable with optim.schedule wsd"),
        ({"optim__cooldown_from": "5 steps"}, "optim.cooldown_from .* null, because optim.schedule is not wsd"),
        ({**WSD, "freeze__mode": "off", "optim__cooldown": 0.95}, "optim.cooldown is 0.95; allowed: at most 900 steps"),
        (
            {**WSD, "freeze__mode": "off", "optim__cooldown_from": "901 steps"},
            "optim.cooldown_from is '901 steps'; allowed: step 100 to 900",
        ),
        ({"freeze__rates": "stable", "freeze__decay": "99 epochs"}, "freeze.decay is '99 epochs'; allowed: 1 to 900"),
        ({"freeze__rates": "level"}, "one of cosine, global, stable"),
    ],
)  # fmt: skip
def test_rates_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_schedule(configure(**values), steps_per_epoch=10)
