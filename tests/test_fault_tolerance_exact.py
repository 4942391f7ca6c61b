"""Killed at an instant of our choice, a run ends as if nothing had happened. Real processes, SIGKILL, CPU, fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import KILLED, Bench, Kill, newest_checkpoint, read_events, read_lines, read_losses
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
TOTAL_STEPS = 16
ADAPTIVE = ("freeze.adaptive_threshold=0.5", "freeze.adaptive_window=8 steps", "freeze.adaptive_floor=0")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("exact"))
    assert bench.run("undisturbed") == [0]
    return bench


def freeze_steps(run_dir: Path) -> list[int]:
    return [event["step"] for event in read_events(run_dir, "freeze")]


def assert_same_end(mine: Path, theirs: Path) -> None:
    """Every figure of every step, every weight, master weight and moment: equal to the last bit."""
    assert list(read_losses(mine)) == list(range(1, TOTAL_STEPS + 1))
    assert read_losses(mine) == read_losses(theirs)
    assert freeze_steps(mine) == freeze_steps(theirs)
    assert_same_tensors(mine, theirs)


def assert_same_tensors(mine: Path, theirs: Path) -> None:
    names = sorted(path.name for path in newest_checkpoint(mine).glob("*.safetensors"))
    assert names == sorted(path.name for path in newest_checkpoint(theirs).glob("*.safetensors"))
    for name in names:
        left, right = load_file(newest_checkpoint(mine) / name), load_file(newest_checkpoint(theirs) / name)
        assert left.keys() == right.keys()
        assert [key for key, value in left.items() if not value.equal(right[key])] == []


def run_through(bench: Bench, run: str, kills: list[Kill], **options: int) -> None:
    """Let one run be killed again and again, and at last end."""
    ranks = options.get("ranks", 1)
    for kill in kills:
        job = bench.start(run, kill=kill, **options)
        job.processes[0].join(120)
        job.kill()
        assert job.processes[0].exitcode == KILLED, bench.log(run)
    assert bench.run(run, **options) == [0] * ranks


def test_kills_around_a_freeze_in_an_accumulation_and_in_saves(bench: Bench) -> None:
    boundary = freeze_steps(bench.folder / "undisturbed")[0]
    assert 3 < boundary - 1 < boundary < 9
    kills = [
        Kill(where="micro_batch", step=1, index=0),  # nothing saved yet
        Kill(where="write_files", step=3),
        Kill(where="write_manifest", step=3),
        Kill(where="write_pointer", step=3),  # whole, and named: step 3 is not lost
        Kill(where="update", step=boundary - 1),
        Kill(where="micro_batch", step=boundary, index=0),
        Kill(where="update", step=boundary),
        Kill(where="delete_old", step=9),
        Kill(where="micro_batch", step=10, index=1),
    ]
    run_through(bench, "killed", kills)
    resumed = [event["step"] for event in read_events(bench.folder / "killed", "resume")]
    assert len(resumed) == len(kills) - 3  # the first three left nothing to go on from
    assert resumed[:2] == [3, 3]
    assert set(resumed[2:4]) <= {3, boundary - boundary % 3}  # its save was on the way when the kill came, or done
    assert resumed[-2:] == [9, 9]
    assert_same_end(bench.folder / "killed", bench.folder / "undisturbed")


@pytest.mark.slow
def test_kills_before_at_and_after_every_freeze(bench: Bench) -> None:
    instants = [("update", -1), ("micro_batch", 0), ("update", 0), ("update", 1)]
    kills = [
        Kill(where=where, step=boundary + offset)
        for boundary in freeze_steps(bench.folder / "undisturbed")
        for where, offset in instants
        if boundary + offset < TOTAL_STEPS
    ]
    for number in range(len(instants)):  # one run per instant, killed there at every freeze that it reaches anew
        run_through(bench, f"freezes-{number}", kills[number :: len(instants)])
        assert_same_end(bench.folder / f"freezes-{number}", bench.folder / "undisturbed")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("half", ["freeze.prefix_precision=bf16"]),
        pytest.param("late-drops", ["freeze.min_steps_between_drops=4"], marks=pytest.mark.slow),
        ("by-weight", ["freeze.mode=adaptive", *ADAPTIVE, "freeze.adaptive_measure=weight"]),
        pytest.param(
            "by-gradient",
            ["freeze.mode=adaptive", *ADAPTIVE, "freeze.adaptive_measure=gradient"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_ways_to_freeze_are_as_exact(bench: Bench, name: str, settings: list[str]) -> None:
    settings = [*settings, "run.log_every_steps=2", "checkpoint.every=5 steps"]  # between checks, between log lines
    assert bench.run(name, *settings) == [0], bench.log(name)
    assert freeze_steps(bench.folder / name)
    for step in (7, 12):
        job = bench.start(f"{name}-killed", *settings, kill=Kill(where="update", step=step))
        job.processes[0].join(120)
    assert bench.run(f"{name}-killed", *settings) == [0], bench.log(f"{name}-killed")
    mine, theirs = bench.folder / f"{name}-killed", bench.folder / name
    assert read_losses(mine) == read_losses(theirs)
    assert_same_tensors(mine, theirs)
    assert read_checks(mine) == read_checks(theirs)


def read_checks(run_dir: Path) -> list[tuple[int, object, int]]:
    events = read_events(run_dir, "adaptive_check")
    return [(event["step"], event["changes"], event["frozen_layers"]) for event in events]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_two_ranks_are_exact_in_every_stage(bench: Bench, stage: int) -> None:
    assert bench.run(f"two-{stage}", ranks=2, stage=stage) == [0, 0]
    run_through(bench, f"two-killed-{stage}", [Kill(where="micro_batch", step=10, index=0)], ranks=2, stage=stage)
    assert_same_end(bench.folder / f"two-killed-{stage}", bench.folder / f"two-{stage}")


def test_other_ranks_and_stages_give_the_same_losses_and_keep_frozen_layers(bench: Bench) -> None:
    """1 -> 2 -> 1 ranks and ZeRO stage 1 -> 2 -> 1 -> 0, across freezes."""
    frozen: dict[str, object] = {}
    for ranks, stage, last in ((1, 1, 6), (2, 2, 9), (1, 1, 12), (2, 0, 15)):
        job = bench.start("changing", ranks=ranks, stage=stage, kill=Kill(where="write_pointer", step=last))
        job.processes[0].join(120)
        job.kill()
        assert job.processes[0].exitcode == KILLED, bench.log("changing")
        weights = load_file(newest_checkpoint(bench.folder / "changing") / "weights.safetensors")
        moved = [name for name, value in frozen.items() if not weights[name].equal(value)]
        assert moved == []
        layers = read_lines(bench.folder / "changing" / "metrics.jsonl")[-1]["frozen_layers"]
        frozen = {name: value for name, value in weights.items() if is_frozen(name, layers)}
    assert bench.run("changing") == [0]
    assert len([name for name in frozen if name.startswith("blocks.")]) > 12
    mine, expected = read_losses(bench.folder / "changing"), read_losses(bench.folder / "undisturbed")
    assert list(mine) == list(range(1, TOTAL_STEPS + 1))
    for step, figures in expected.items():
        assert mine[step]["loss"] == pytest.approx(figures["loss"], rel=1e-5), f"step {step}"
        assert mine[step]["lr"] == figures["lr"]


def is_frozen(name: str, layers: int) -> bool:
    """Whether a parameter belongs to the first `layers` layers."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) < layers - 1
    return layers > 0 and name.startswith(("cls_token", "patch_embed"))
