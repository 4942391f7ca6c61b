"""Settings: read, overridden, checked, dumped, compared."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from vitfreeze.config import (
    RECIPE_FOLDER,
    ArgumentError,
    Config,
    ConfigError,
    Duration,
    Range,
    check_argument,
    count_steps,
    derive_accumulation,
    describe_allowed,
    differing_settings,
    dump_config,
    explain_config,
    is_allowed,
    load_config,
    settings,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("500 steps", 500, "steps"), ("1 step", 1, "steps"), ("10 epochs", 10, "epochs"), ("2.5 epochs", 2.5, "epochs"),
        ("30 minutes", 30, "minutes"), ("5%", 0.05, "fraction"), (0.1, 0.1, "fraction"), ("0.25", 0.25, "fraction"),
        (1, 1.0, "fraction"), ("1e3 steps", 1000, "steps"),
    ],
)  # fmt: skip
def test_duration_spellings(text: object, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)
    assert Duration.parse(str(Duration(value, unit))) == Duration(value, unit)


@pytest.mark.parametrize(
    "text", ["", "ten epochs", "-1 steps", 2, "1.5", True, "5 parsecs", "--1 steps", "inf steps", "101%"]
)
def test_duration_refuses(text: object) -> None:
    with pytest.raises(ValueError, match="a duration like"):
        Duration.parse(text)


def test_duration_in_steps() -> None:
    assert Duration.parse("1.5 epochs").to_steps(steps_per_epoch=100) == 150
    assert Duration.parse("10%").to_steps(steps_per_epoch=1, total_steps=55) == 6
    with pytest.raises(ValueError, match="minutes"):
        Duration.parse("3 minutes").to_steps(steps_per_epoch=10, total_steps=10)


def test_recipe_override_and_origin(tmp_path: Path) -> None:
    recipe = write(tmp_path / "mine.yaml", "base: paper\noptim:\n  blr: 3e-4\nfreeze:\n  mode: off\n")
    (tmp_path / "second.yaml").write_text("optim:\n  eps: 1e-7\nbase: mine.yaml\n")
    assert load_config(tmp_path / "second.yaml").optim.blr == 3e-4
    config = load_config(recipe, ["freeze.how=linear", "data.train=a.tar", "data.val=[b.tar, c.tar]"])
    assert config.optim.blr == 3e-4  # PyYAML alone reads this as a text
    assert config.freeze.mode == "off"  # and this as false
    assert (config.data.train, config.data.val) == (("a.tar",), ("b.tar", "c.tar"))
    assert config.origins["optim.blr"] == "mine.yaml line 3"
    assert config.origins["freeze.how"] == "the command line"
    assert config.origins["batch.global_size"].startswith("paper.yaml")
    assert config.base_lr == pytest.approx(3e-4 * 2048 / 256)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml")))
def test_dump_reads_back_the_same(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert load_config(write(tmp_path / "dump.yaml", dump_config(config))) == config


def test_absolute_rate_survives_the_dump(tmp_path: Path) -> None:
    config = load_config("paper", ["optim.blr=null", "optim.base_lr=1e-3"])
    assert config.base_lr == 1e-3
    assert load_config(write(tmp_path / "dump.yaml", dump_config(config))) == config


def test_every_setting_is_explained_and_has_its_type() -> None:
    text = explain_config(Config())
    for key, _, option in settings(Config()):
        assert key in text
        assert len(option.metadata["help"]) > 5, key


# What a number, or a length, may be is said by the geometry of the model.
RULES_OF_THE_MODEL = {"model.img_size", "model.patch_size", "model.depth"}


def test_every_setting_declares_what_it_may_be() -> None:
    text = explain_config(load_config("paper"))
    for key, value, option in settings(Config()):
        assert f"{key} = " in text
        assert f"    allowed: {describe_allowed(option)}\n" in f"{text}\n"
        assert is_allowed(value, option), f"{key}: its default breaks its rule"
        if isinstance(value, Duration):
            assert set(option.metadata["unit"].split(", ")) <= {"steps", "epochs", "minutes", "fraction"}, key
        elif option.type in ("int", "float", "int | None", "float | None") and key not in RULES_OF_THE_MODEL:
            assert option.metadata["within"] is not None, key


def test_the_rule_is_shown_beside_the_setting() -> None:
    lines = explain_config(load_config("paper")).splitlines()
    below = {line.split(" = ")[0]: lines[number + 2].strip() for number, line in enumerate(lines) if " = " in line}
    assert below["freeze.t_0"] == "allowed: a number in (0, 1]"
    assert below["batch.micro_size"] == "allowed: an integer of at least 1 (images), or null"
    assert below["data.crop_scale"] == "allowed: two numbers in (0, 1] and in rising order"
    assert below["run.length"] == "allowed: a duration above 0 (steps, epochs)"
    assert below["freeze.how"] == "allowed: one of linear, squared, cubic"


@pytest.mark.parametrize(
    ("within", "words", "inside", "outside"),
    [
        (Range(0), "of at least 0", (0, 7.5), (-1e-9, math.inf, math.nan)),
        (Range(0, open_low=True), "above 0", (1e-9,), (0, math.inf)),
        (Range(0, 1, open_low=True), "in (0, 1]", (1e-9, 1), (0, 1.1, math.nan)),
        (Range(0, 1, open_high=True), "in [0, 1)", (0, (0.9, 0.95)), (1, (0.9, 1.0))),
        (Range(0, 2**31 - 1), "in [0, 2147483647]", (2**31 - 1,), (2**31,)),
        (Range(0, 1, rising=True), "in [0, 1] and in rising order", ((0.2, 1.0), (0.5, 0.5)), ((1.0, 0.2),)),
    ],
)
def test_range(within: Range, words: str, inside: tuple[object, ...], outside: tuple[object, ...]) -> None:
    assert str(within) == words
    assert [value for value in inside if value not in within] == []
    assert [value for value in outside if value in within] == []


def test_an_argument_is_judged_by_the_rule_of_its_setting() -> None:
    check_argument("data.prefetch", 1)
    with pytest.raises(ArgumentError, match=r"^prefetch is 0, expected an integer of at least 1$"):
        check_argument("data.prefetch", 0)
    with pytest.raises(ArgumentError, match=r"^measure is 'sound', expected one of weight, gradient$"):
        check_argument("freeze.adaptive_measure", "sound", name="measure")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("freeze.t_0=0", "a number in \\(0, 1\\]"),
        ("freeze.how=quartic", "one of linear, squared, cubic"),
        ("optim.blr=fast", "a number"),
        ("optim.base_lr=1e-3", "one of base_lr and blr"),
        ("run.seed=1.5", "a whole number"),
        ("run.length=50%", "steps, epochs"),
        ("freeze.scale_lr=1", "true or false"),
        ("data.crop_scale=[0.5]", "two numbers"),
        ("data.crop_scale=[1, 0.5]", "two numbers in .* rising order"),
        ("optim.betas=[0.9, 1]", r"two numbers in \[0, 1\)"),
        ("checkpoint.every=0", "a duration above 0 .steps, epochs, minutes, fraction"),
        ("eval.every=5 minutes", "a duration .steps, epochs, fraction"),
        ("data.cache_gigabytes=0", "a number above 0"),
        ("model.mlp_ratio=0", "a number above 0, or null"),
        ("loss.scale_weights=[1, 1, 1]", "four numbers"),
        ("model.embed_dim=100", "multiple"),
        ("optim.eps=.nan", "a finite number"),
        ("nonsense", "is not an override"),
        ("fre.t_0=1", "did you mean 'freeze.t_0'"),
    ],
)
def test_refusals_say_what_is_allowed(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_config("paper", [override])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("freeze: 3\n", "line 1"), ("- a\n", "sections"), ("freeze: [\n", "not readable YAML"),
        ("freeze:\n  tO: 1\n", "line 2.*did you mean"), ("base: nowhere\n", "no recipe 'nowhere'"),
        ("a: !!python/object/apply:os.system ['true']\n", "section"),
        ("run:\n  dir: !!python/object/apply:os.system ['touch /tmp/owned']\n", "YAML"),
    ],
)  # fmt: skip
def test_broken_recipes(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path / "broken.yaml", text))


def test_recipe_that_is_its_own_base(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    write(path, f"base: {path}\n")
    with pytest.raises(ConfigError, match="its own base"):
        load_config(path)


def test_accumulation_shows_its_arithmetic() -> None:
    config = load_config("paper", ["batch.global_size=2048", "batch.micro_size=64"])
    assert derive_accumulation(config, world_size=8) == (64, 4)
    assert derive_accumulation(config, world_size=64) == (32, 1), "more ranks than full micro-batches"
    with pytest.raises(ConfigError, match=r"64 x 24 = 1536; 2048 / 1536 = 1\.333"):
        derive_accumulation(config, world_size=24)
    with pytest.raises(ConfigError, match="2048 / 3 is not whole"):
        derive_accumulation(load_config("paper", ["batch.micro_size=null"]), world_size=3)


def test_warm_up_must_leave_something() -> None:
    with pytest.raises(ConfigError, match="shorter than the run: 100 of 100 steps"):
        count_steps(load_config("paper", ["run.length=100 steps", "optim.warmup=100 steps"]), steps_per_epoch=10)
    with pytest.raises(ConfigError, match="at least 1 step"):
        count_steps(load_config("paper", ["run.length=0.001 epochs"]), steps_per_epoch=10)


def test_only_settings_that_change_the_run_are_compared() -> None:
    config = load_config("paper")
    assert differing_settings(config, load_config("paper", ["data.workers=3", "run.dir=there"])) == []
    (line,) = differing_settings(config, load_config("paper", ["freeze.t_0=0.9"]))
    assert line == "freeze.t_0: 0.9 there, 0.8 now"


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().freeze.t_0 = 0.5  # type: ignore[misc]
