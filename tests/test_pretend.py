"""One rank of many on one CPU: `vitfreeze doctor --pretend`, and what more ranks ask of the host."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import LAUNCHER, run_command, run_ranks
from tiny_shards import write_shards

from vitfreeze.config import load_config
from vitfreeze.doctor import pretend as doctor
from vitfreeze.engine.settings import complete_settings, read_settings
from vitfreeze.planner import plan
from vitfreeze.ranks import ClusterError

TINY = (
    "model.size=vit_tiny_test", "model.img_size=32", "freeze.t_0=0.3", "freeze.how=linear", "run.length=400 steps",
    "optim.warmup=1 steps",
)  # fmt: skip


def pretend(ranks: int, *arguments: str) -> dict[str, Any]:
    done = run_command("doctor", "--pretend", str(ranks), "paper", *TINY, *arguments, "--json")
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    # Whether a host is quick enough depends on the machine, and a GPU has little to do with so small a model.
    unfit = {name for name, finding in found["findings"].items() if finding["fit"] is False}
    assert unfit <= {"host"}, found["findings"]
    assert done.returncode == bool(unfit)
    return found


def test_a_small_world_with_its_shards(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [70, 60])
    settings = (f"data.train={shards}", "batch.global_size=16", "batch.micro_size=2", "run.ds_config=zero2_bf16")
    found = pretend(4, *settings, "--rank", "3", "--steps", "1")
    config = load_config("paper", [*TINY, *settings])
    stages = plan(config, world_size=4, images_per_epoch=130).stages
    assert [s["first_step"] for s in found["stages"]] == [stage.first_step for stage in stages]
    assert [s["frozen_layers"] for s in found["stages"]] == [stage.frozen_layers for stage in stages]
    assert [s["trainable"] for s in found["stages"]] == [stage.trainable_parameters for stage in stages]
    assert found["stages"][-1]["frozen_layers"] == 8
    for stage in found["stages"]:
        assert stage["activation_bytes"] == stage["planned_activation_bytes"]
        assert stage["held"] <= stage["planned_held"] < stage["trainable"] / 4 + 40
        assert (stage["micro_batch"], stage["accumulation"]) == (2, 2)
    said = "\n".join(found["changes"])
    for words in ("fp32 in place of bf16 (zero2_bf16.json)", "130 in 2 shards", "1 steps at the beginning of each"):
        assert words in said
    assert "of a micro-batch" not in said  # the two images of a micro-batch are all computed


def test_a_thousand_ranks_without_shards() -> None:
    settings = ("batch.global_size=4096", "batch.micro_size=4", "data.train=/nowhere/at/all", "run.length=0.5 epochs")
    found = pretend(1024, *settings, "--steps", "1")
    assert found["world_size"] == 1024
    first, last = found["stages"][0], found["stages"][-1]
    assert first["held"] == first["planned_held"]
    assert first["held"] * 1024 >= first["trainable"] > last["trainable"] > 0
    assert all(stage["is_ordered"] for stage in found["stages"])
    said = "\n".join(found["changes"])
    assert "random pixels, because data.train cannot be read here" in said
    assert "2 of the 4 images of a micro-batch" in said
    few, many = found["host"][-1]["collectives"], found["host"][0]["collectives"]
    assert few < many


def test_fine_tuning_with_freezing() -> None:
    settings = (
        "model.size=vit_tiny_test", "model.img_size=32", "freeze.mode=schedule", "freeze.t_0=0.3", "freeze.how=linear",
        "run.length=400 steps", "optim.warmup=1 steps", "batch.global_size=256", "batch.micro_size=4",
        "finetune.clip_grad=1.0", "run.ds_config=zero1_bf16",
    )  # fmt: skip
    done = run_command(
        "doctor", "--pretend", "64", "finetune_b_100ep", *settings, "--rank", "63", "--steps", "1", "--json"
    )
    found = json.loads(done.stdout)
    assert {name for name, finding in found["findings"].items() if finding["fit"] is False} <= {"host"}
    stages = plan(load_config("finetune_b_100ep", settings), world_size=64).stages
    assert [s["trainable"] for s in found["stages"]] == [stage.trainable_parameters for stage in stages]
    assert found["stages"][-1]["frozen_layers"] > 0
    for stage in found["stages"]:
        assert stage["activation_bytes"] <= 1.02 * stage["planned_activation_bytes"]
        assert stage["held"] <= stage["planned_held"]
    assert any("neither augmented nor mixed" in change for change in found["changes"])


def test_text() -> None:
    settings = ("batch.global_size=4", "batch.micro_size=2", "run.length=100 steps", "freeze.mode=off")
    done = run_command("doctor", "--pretend", "2", "paper", *TINY, *settings, "--steps", "1")
    for words in ("rank 0 of 2 through torch's fake process group", "Otherwise than in the run:", "cores a GPU"):
        assert words in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("paper", {"world_size": 2, "rank": 2}, "there is no rank 2 of 2: they count from 0 to 1"),
        ("paper", {"world_size": 3}, "batch.global_size"),
        ("paper", {"world_size": 0}, "the number of ranks is 0, expected at least 1"),
        ("paper", {"world_size": 2, "images": 0}, "images is 0, expected at least 1"),
    ],
)
def test_refusals(recipe: str, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        doctor.pretend(load_config(recipe), **options)


def test_a_process_of_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ClusterError, match="without a launcher"):
        doctor.pretend(load_config("paper"), world_size=2)


def count_calls(world_size: int) -> tuple[int, int]:
    """Return how many functions of ours, and of everybody's, one step of one rank of so many calls."""
    import cProfile
    import pstats

    from vitfreeze.curriculum import ImageStage
    from vitfreeze.doctor.pretend import _take_step
    from vitfreeze.engine import join_fake_ranks
    from vitfreeze.training.build import build_engine

    for name in LAUNCHER:
        os.environ.pop(name, None)
    ranks = join_fake_ranks(rank=0, world_size=world_size)
    batch = (f"batch.global_size={2 * world_size}", "batch.micro_size=2")
    engine = build_engine(load_config("paper", [*TINY, "run.ds_config=cpu", *batch]), ranks, frozen_layers=0)
    engine.set_learning_rates(dict.fromkeys(engine.unit_names, 1e-4))
    images = ImageStage(first_step=0, img_size=32, mask_ratio=0.75, decoded_share=1.0)
    for _ in range(2):
        _take_step(engine, [torch.zeros(2, 3, 32, 32)], images)
    profile = cProfile.Profile()
    profile.runcall(_take_step, engine, [torch.zeros(2, 3, 32, 32)], images)
    on_cpu = ranks.on_cpu()
    profile.runcall(lambda: on_cpu.begin_max([0, 0, 0])())
    calls = {key: times for key, (_, times, *_) in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    return sum(times for (file, *_), times in calls.items() if "/vitfreeze/" in file), sum(calls.values())


def test_our_own_code_does_no_more_in_a_step_of_more_ranks() -> None:
    counts = [run_ranks(count_calls, ranks, world_size=1)[0] for ranks in (2, 1024)]
    (ours, everything), (ours_later, everything_later) = counts
    assert ours_later == ours > 100
    assert everything_later < 1.05 * everything  # of DeepSpeed and torch, too


@pytest.mark.parametrize(("clips", "world_size", "expected"), [(1.0, 2, False), (1.0, 1, None), (0, 1024, None)])
def test_gradients_that_are_clipped_are_not_cut_into_a_slice_for_each_rank(
    clips: float, world_size: int, expected: bool | None
) -> None:
    settings = read_settings({"zero_optimization": {"stage": 1}, "gradient_clipping": clips})
    content = complete_settings(
        settings, micro_batch=1, accumulation=1, world_size=world_size, active_elements=100,
        checks_gradients=settings.clips,
    )  # fmt: skip
    assert content["zero_optimization"].get("reduce_scatter") is expected


def test_the_plan_tells_how_clipped_gradients_are_handled() -> None:
    config = load_config("paper", ["finetune.clip_grad=1.0", "run.task=finetune"])
    for world_size, told in ((8, 1), (1, 0)):
        notes = plan(config, world_size=world_size).notes
        assert sum("reduce_scatter false" in note for note in notes) == told
    assert not any("reduce_scatter" in note for note in plan(load_config("paper"), world_size=8).notes)
