"""A target and a freezing policy from another package, installed for real and trained through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from processes import run_command
from test_pretrain import ROOT, SMALL

from vitfreeze import extensions
from vitfreeze.config import ConfigError, load_config
from vitfreeze.extensions import BUILT_IN, FREEZING, TARGETS, ExtensionError, list_names, load_extension, pin_version
from vitfreeze.schedule import FreezeSchedule

# docs/extensions.md holds this package, word for word.
PAGE = (ROOT / "docs" / "extensions.md").read_text()
SETTINGS = (
    "model.target=colour", "freeze.how=late", "freeze.t_0=0.4", "run.length=12 steps", "checkpoint.every=6 steps",
    "run.log_every_steps=1", "run.show_every=12 steps",
)  # fmt: skip


def block_of(page: str, name: str) -> str:
    """Return the fenced block that follows the name of a file."""
    return page.partition(f"`{name}`")[2].partition("```")[2].partition("\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed the package of the page."""
    folder = tmp_path_factory.mktemp("extension")
    (folder / "source").mkdir()
    for name in ("pyproject.toml", "my_vit_extras.py"):
        (folder / "source" / name).write_text(block_of(PAGE, name))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "source")], check=True, timeout=120)
    return folder / "site"


def call(site: Path, *arguments: str, status: int = 0) -> str:
    done = run_command(*arguments, path=[site])
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def losses_of(run_dir: Path) -> list[tuple[int, float, int]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["frozen_layers"]) for line in lines]


def test_a_target_and_a_policy_from_outside_train_and_resume_exactly(
    installed: Path, demo_shards: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = [f"data.train={demo_shards}", "data.val=[]", *SMALL, *SETTINGS]
    call(installed, "pretrain", "demo", *settings, f"run.dir={whole}")
    config = (whole / "config.yaml").read_text()
    assert "target: colour@1.0" in config
    assert "how: late@1.0" in config
    shutil.copytree(whole, stopped)
    (last,) = (stopped / "checkpoints").glob("*12")
    shutil.rmtree(last)
    resumed = call(installed, "pretrain", "demo", *settings, f"run.dir={stopped}")
    assert "at step 6" in resumed
    assert losses_of(stopped) == losses_of(whole)
    assert losses_of(whole)[-1][2] > 0, "the policy has frozen layers"
    for name in ("weights.safetensors",):
        assert (stopped / "checkpoints" / last.name / name).read_bytes() == (last_of(whole) / name).read_bytes()

    (metadata,) = installed.glob("*.dist-info/METADATA")
    newer = tmp_path / "newer"
    shutil.copytree(installed, newer)
    (newer / metadata.relative_to(installed)).write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    refused = call(newer, "pretrain", "demo", *settings, f"run.dir={stopped}", status=2)
    assert "model.target: 'colour@1.0' there, 'colour@1.1' now" in refused
    pinned = call(newer, "config", "demo", "freeze.how=late@1.0", status=2)
    assert "freeze.how is 'late@1.0'; allowed: late@1.1, the version of my-vit-extras that is installed" in pinned
    gone = call(tmp_path, "knn", str(whole), "--train", str(demo_shards), "--val", str(demo_shards), status=2)
    assert "'colour' cannot be used; allowed: one of hog" in gone


def last_of(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("*12"))


def test_names_are_listed_planned_and_met_with_the_nearest(installed: Path) -> None:
    shown = call(installed, "config", "demo", "freeze.how=late")
    assert "allowed: one of linear, squared, cubic, late" in shown
    assert "allowed: one of hog, colour" in shown
    assert "freeze.how = 'late@1.0'" in shown
    assert "late@1.0" in call(installed, "plan", "demo", "freeze.how=late", "model.target=colour")
    wrong = call(installed, "plan", "demo", "model.target=color", status=2)
    assert "model.target is 'color'; allowed: one of hog, colour; did you mean 'colour'?" in wrong
    ignored = call(installed, "plan", "demo", "model.target=colour", "model.hog_nbins=18", status=2)
    assert "model.hog_nbins is 18; allowed: left out, because model.target is colour@1.0" in ignored


def test_what_comes_with_vitfreeze_is_in_the_same_registry() -> None:
    assert load_extension(FREEZING, "squared")(3, 0.5) == [0.25, 0.5625, 1.0]
    for group, names in BUILT_IN.items():
        assert list_names(group)[: len(names)] == list(names)
        for name in names:
            assert callable(load_extension(group, name))
            assert pin_version(group, name) == name


@pytest.mark.parametrize(
    ("value", "words"),
    [("nowhere:policy", "nowhere:policy cannot"), ("math:nothing", "math:nothing cannot")],
)
def test_what_cannot_be_imported_is_said(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_find", lambda group, name: EntryPoint(name, value, group))
    with pytest.raises(ExtensionError, match=words):
        load_extension(TARGETS, "broken")


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.4, 1.0], [0.0, 0.5, 1.0], [0.2, 0.5, 0.9], [float("nan"), 0.5, 1.0]])
def test_a_policy_that_gives_no_shares_is_refused(shares: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitfreeze.schedule.load_extension", lambda group, name: lambda num_layers, t_0: shares)
    with pytest.raises(ValueError, match="expected a policy that gives 3 rising shares above 0, the last of them 1"):
        FreezeSchedule(
            num_layers=3, t_0=0.5, how="odd", scale_lr=True, total_steps=100, warmup_steps=0, base_lr=1e-3
        )  # fmt: skip


def test_two_packages_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("late", f"{module}:late", FREEZING) for module in ("one", "two")]
    monkeypatch.setattr(extensions, "entry_points", lambda **_: points)
    with pytest.raises(ConfigError, match="late is registered by one:late and two:late"):
        load_config("demo", ["freeze.how=late"])
