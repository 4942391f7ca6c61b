"""A run with optim.schedule wsd is lengthened, or cooled down in another folder, across freezes and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jobs import KILLED, Bench, Kill, read_events, read_lines, read_losses
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
# 16 steps, of which the last 4 cool down; layers freeze from step 6 on.
SETTINGS: dict[str, dict[str, Any]] = {
    "optim": {"blr": 0.05, "warmup": "1 steps", "schedule": "wsd", "cooldown": "4 steps"},
    "freeze": {"t_0": 0.3, "how": "linear", "rates": "stable", "decay": "2 steps"},
    "checkpoint": {"every": "3 steps", "keep": 100},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("cooldown"), **SETTINGS)
    assert bench.run("whole") == [0], bench.log("whole")
    return bench


def kill_at(bench: Bench, run: str, step: int, *settings: str) -> None:
    job = bench.start(run, *settings, kill=Kill(where="update", step=step))
    assert job.wait() == [KILLED], bench.log(run)


def test_lengthened_without_freezing_it_is_the_longer_run_to_the_bit(bench: Bench) -> None:
    kill_at(bench, "grown", 11, "freeze.mode=off")
    longer = ["freeze.mode=off", "run.length=20 steps"]
    assert bench.run("grown", *longer) == [0], bench.log("grown")
    assert bench.run("long", *longer) == [0]
    assert read_losses(bench.folder / "grown") == read_losses(bench.folder / "long")


def test_the_checkpoint_before_the_cooldown_stays_and_is_lengthened(bench: Bench) -> None:
    plain = ("freeze.mode=off", "checkpoint.keep=1")
    assert bench.run("ended", *plain) == [0], bench.log("ended")
    there = sorted(path.name for path in (bench.folder / "ended" / "checkpoints").glob("step-*"))
    assert there == ["step-00000012", "step-00000016"]
    longer = [*plain, "run.length=20 steps"]
    assert bench.run("ended", *longer) == [2]
    assert "goes on in another run.dir: resume.from=CHECKPOINT" in bench.log("ended")
    source = bench.folder / "ended" / "checkpoints" / "step-00000012"
    assert bench.run("after", *longer, f"resume.from={source}") == [0], bench.log("after")
    assert bench.run("at once", *longer) == [0]
    after, whole = (read_losses(bench.folder / name) for name in ("after", "at once"))
    assert after == {step: whole[step] for step in range(13, 21)}


def test_lengthened_on_two_ranks_what_is_frozen_stays_frozen(bench: Bench) -> None:
    kill_at(bench, "frozen", 11)
    before = load_file(bench.folder / "frozen" / "checkpoints" / "step-00000009" / "weights.safetensors")
    frozen = read_losses(bench.folder / "frozen")[9]["frozen_layers"]
    assert frozen == 2
    assert bench.run("frozen", "run.length=40 steps", ranks=2) == [0, 0], bench.log("frozen")
    losses, whole = read_losses(bench.folder / "frozen"), read_losses(bench.folder / "whole")
    assert list(losses) == list(range(1, 41))
    assert losses[10]["frozen_layers"] == frozen < losses[40]["frozen_layers"]
    # In the shorter run layer 2 leaves here, with head 0; the other scales have the same loss.
    assert whole[10]["frozen_layers"] == 3
    for scale, loss in whole[10]["losses"].items():
        assert losses[10]["losses"][scale] == pytest.approx(loss, rel=1e-5)
    assert losses[30]["lr"]["head_3"] == losses[10]["lr"]["head_3"] > losses[40]["lr"]["head_3"] > 0
    after = load_file(bench.folder / "frozen" / "checkpoints" / "step-00000039" / "weights.safetensors")
    moved = {name for name, value in before.items() if not after[name].equal(value)}
    assert moved
    assert not [name for name in moved for k in range(frozen - 1) if name.startswith(f"blocks.{k}.")]


def test_cooled_down_in_another_folder_on_two_ranks(bench: Bench) -> None:
    source = bench.folder / "whole" / "checkpoints" / "step-00000006"
    before = sorted((path, path.stat().st_mtime_ns) for path in source.parents[1].rglob("*"))
    options: dict[str, Any] = {"ranks": 2, "kill_rank": 1}
    job = bench.start("cooled", "--cooldown", str(source), kill=Kill(where="update", step=9), **options)
    job.processes[1].join(120)
    job.kill()
    assert bench.run("cooled", "--cooldown", str(source), ranks=2) == [0, 0], bench.log("cooled")
    assert sorted((path, path.stat().st_mtime_ns) for path in source.parents[1].rglob("*")) == before
    cooled, whole = read_losses(bench.folder / "cooled"), read_losses(bench.folder / "whole")
    assert list(cooled) == [7, 8, 9, 10]
    assert cooled[7]["loss"] == pytest.approx(whole[7]["loss"], rel=1e-5)
    rate = whole[7]["lr"]["head_3"]
    assert [cooled[step]["lr"]["head_3"] / rate for step in cooled] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [cooled[step]["frozen_layers"] for step in cooled] == [whole[step]["frozen_layers"] for step in cooled]
    assert max(cooled[10]["lr"].values()) == pytest.approx(rate / 4)
    assert next(event["step"] for event in read_events(bench.folder / "cooled", "resume")) == 6


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        ("whole", ["run.length=20 steps"], "may grow until the run cools down from step 12 on, and 16 are taken"),
        ("whole", ["--cooldown", "whole"], "optim.cooldown_from"),
        ("late", ["--cooldown", "whole"], "optim.cooldown_from is '16 steps'; allowed: step 1 to 12"),
        ("none", ["--cooldown", "stage1.json"], "names neither a checkpoint nor a run that has one"),
        ("cosine", ["--cooldown", "whole", "optim.schedule=cosine"], "null, because optim.schedule is not wsd"),
    ],
)
def test_what_cannot_be_lengthened_or_cooled_is_refused(
    bench: Bench, run: str, settings: list[str], message: str
) -> None:
    settings = [str(bench.folder / word) if (bench.folder / word).exists() else word for word in settings]
    lines = len(read_lines(bench.folder / "whole" / "metrics.jsonl"))
    assert bench.run(run, *settings) == [2]
    assert message in bench.log(run)
    assert len(read_lines(Path(bench.folder / "whole" / "metrics.jsonl"))) == lines
