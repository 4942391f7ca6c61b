"""Figures are drawn whole, from what a recipe and a run folder hold, and only matplotlib's users pay for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from vitfreeze.config import Config, ConfigError, build_config, dump_config, load_config
from vitfreeze.planner import plan
from vitfreeze.plots import plot_run, plot_schedule
from vitfreeze.schedule import build_schedule

PNG, SVG = b"\x89PNG", "{http://www.w3.org/2000/svg}"
STEPS_PER_EPOCH = 10


def configure(**values: Any) -> Config:
    given = {"model__size": "vit_tiny_test", "model__img_size": 64, "run__length": "120 steps", **values}
    given = {"optim__warmup": "12 steps", "batch__global_size": 64, **given}
    return build_config({key.replace("__", "."): (value, "a test") for key, value in given.items()}, recipe="test")


def write_run(folder: Path, config: Config, *, upto: int = 120) -> Path:
    """Write the files of a run that follows its schedule, as the training loop writes them."""
    schedule = build_schedule(config, steps_per_epoch=STEPS_PER_EPOCH)
    stages = {stage.frozen_layers: stage for stage in plan(config, steps_per_epoch=STEPS_PER_EPOCH).stages}
    lines = []
    for step in range(upto):
        if schedule.adaptive is not None and schedule.adaptive.is_check(step):
            schedule.adaptive.record(step, changes=None)
    # Every four steps, at the end of the run, and before each freeze.
    logged = {*range(4, upto + 1, 4), *(step for step, _ in schedule.prefix_changes() if step <= upto)}
    for step in sorted(logged):
        now = schedule.at(step - 1)
        losses = {scale: 0.3 - step / 1000 for scale, head in (("4", 0), ("2", 1), ("1", 2), ("0.5", 3))
                  if head in now.heads}  # fmt: skip
        lines.append(
            {
                "step": step, "epoch": step / STEPS_PER_EPOCH, "loss": sum(losses.values()), "losses": losses,
                "lr": now.learning_rates, "frozen_layers": now.frozen_layers, "data_wait_fraction": 0.02,
                "images_per_second": 100 / stages[now.frozen_layers].relative_cost, "gradient_elements": 1,
                "optimizer_state_bytes": stages[now.frozen_layers].optimizer_state_bytes,
                "loss_scale": 1.0, "world_size": 1,
            }
        )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [{"event": "freeze", "step": step, "seconds": 0.1} for step, _ in schedule.prefix_changes()]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def words_of(path: Path) -> str:
    """All text of an SVG; matplotlib keeps each text it draws as a comment beside the glyphs."""
    builder = ElementTree.TreeBuilder(insert_comments=True)
    tree = ElementTree.parse(path, parser=ElementTree.XMLParser(target=builder))
    return " ".join(element.text or "" for element in tree.iter() if element.tag is ElementTree.Comment)


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("paper", [], ["cubic, scaled rates", "saves 15.2% of the computing", "a layer freezes", "warm-up"]),
        ("unscaled", ["model.size=vit_large_patch16"], ["vit_large_patch16", "unscaled rates", "24"]),
        ("off", [], ["freezing off", "nothing freezes by schedule"]),
        ("paper", ["freeze.heads_lr=layer", "optim.warmup=0"], ["as the layer of their tap"]),
        ("paper", ["freeze.cls_token=false", "freeze.patch_embed=false"], ["learning rate", "epoch"]),
        ("paper", ["freeze.mode=adaptive"], ["freezing adaptive"]),
        ("half", [], ["image side", "128", "160", "224", "saves 47.4% of the computing", "a layer freezes"]),
        ("finetune_b_100ep", ["freeze.mode=schedule"], ["classifier", "a layer freezes"]),
    ],
)
def test_schedule_is_drawn_with_its_labels(tmp_path: Path, recipe: str, overrides: list[str], words: list[str]) -> None:
    path = plot_schedule(load_config(recipe, overrides), tmp_path / "new folder" / "figure.svg")
    drawn = words_of(path)
    for word in [*words, "learning rate", "layer (0: patch embedding)", "cost of a step"]:
        assert word in drawn
    assert ("image side" in drawn) == (recipe == "half"), "sizes are drawn where they change"


def test_schedule_as_png_has_every_layer_in_its_own_colour(tmp_path: Path) -> None:
    path = plot_schedule(load_config("paper"), tmp_path / "figure.png")
    assert path.read_bytes().startswith(PNG)
    with Image.open(path) as image:
        colors = {color for count, color in image.convert("RGB").getcolors(maxcolors=2**24) if count > 500}
    greens = {color for color in colors if max(color) - min(color) > 40}
    assert len(greens) >= 13


def test_run_is_drawn_with_the_plan_beside_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", configure())
    drawn = words_of(plot_run(run, tmp_path / "run.svg"))
    saving = f"{100 * plan(configure(), steps_per_epoch=STEPS_PER_EPOCH).saving:.1f} %"
    for word in ["my run", "loss of each scale", "0.5 x the patch grid", "images per second", "planned", "measured"]:
        assert word in drawn
    assert drawn.count(saving) == 2  # planned, and measured because the speeds were written to follow the plan


@pytest.mark.parametrize(
    ("values", "upto"),
    [
        ({"freeze__mode": "off"}, 120),
        ({}, 8),
        ({}, 4),
        ({"freeze__mode": "adaptive", "freeze__adaptive_window": 0.1}, 120),
    ],
)
def test_unfinished_and_unfrozen_runs_are_drawn_too(tmp_path: Path, values: dict[str, Any], upto: int) -> None:
    run = write_run(tmp_path / "run", configure(**values), upto=upto)
    assert plot_run(run, tmp_path / "run.png").read_bytes().startswith(PNG)


def test_a_run_that_went_on_from_frozen_layers_is_drawn_without_the_plan(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", configure())
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[-3:]))
    drawn = words_of(plot_run(run, tmp_path / "run.svg"))
    assert "images per second" in drawn
    assert "planned" not in drawn


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"figure\.jpg.*\.png or \.svg"):
        plot_schedule(load_config("paper"), tmp_path / "figure.jpg")
    with pytest.raises(ConfigError, match=r"holds no metrics\.jsonl"):
        plot_run(tmp_path, tmp_path / "run.png")


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, vitfreeze.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
