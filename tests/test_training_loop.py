"""The loop, on real processes: growing micro-batches and adaptive freezing."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import KILLED, Bench, Kill, read_events, read_losses

pytestmark = pytest.mark.distributed

TOTAL_STEPS = 16  # of the recipe in jobs.py
ADAPTIVE = {
    "mode": "adaptive", "adaptive_window": "4 steps", "adaptive_floor": "6 steps", "adaptive_threshold": 0.02,
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("train"))


def test_growing_micro_batches_keep_the_trajectory(bench: Bench) -> None:
    cut = ["batch.global_size=8", "batch.micro_size=1"]
    assert bench.run("plain", *cut) == [0], bench.log("plain")
    assert bench.run("grown", *cut, "batch.grow_micro_batch=true") == [0], bench.log("grown")
    sizes = [event["micro_batch"] for event in read_events(bench.folder / "grown", "micro_batch")]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= 4
    plain, grown = read_losses(bench.folder / "plain"), read_losses(bench.folder / "grown")
    assert list(plain) == list(grown)
    for step, line in plain.items():
        assert grown[step]["loss"] == pytest.approx(line["loss"], rel=1e-4), f"step {step}"


def test_adaptive_decisions_are_replayed_on_resume(tmp_path: Path) -> None:
    bench = Bench(tmp_path, freeze=ADAPTIVE)
    assert bench.run("whole") == [0], bench.log("whole")
    checks = read_events(tmp_path / "whole", "adaptive_check")
    assert [check["step"] for check in checks] == list(range(1, TOTAL_STEPS))
    prefixes = [check["frozen_layers"] for check in checks]
    assert prefixes == sorted(prefixes)
    assert prefixes[0] == 0
    assert 0 < prefixes[-1] <= 8
    assert all(not prefix for prefix, check in zip(prefixes, checks, strict=True) if check["step"] < 6)

    assert bench.run("killed", kill=Kill(where="update", step=11)) == [KILLED]
    before = read_events(tmp_path / "killed", "adaptive_check")
    assert bench.run("killed") == [0], bench.log("killed")
    (resume,) = read_events(tmp_path / "killed", "resume")
    after = read_events(tmp_path / "killed", "adaptive_check")
    kept = [check for check in before if check["step"] < resume["step"]]
    assert kept
    assert [{**check, "time": 0} for check in after[: len(kept)]] == [{**check, "time": 0} for check in kept]
    assert [check["step"] for check in after] == list(range(1, TOTAL_STEPS))


def test_two_ranks_measure_the_same_change(tmp_path: Path) -> None:
    bench = Bench(tmp_path, freeze=ADAPTIVE)
    assert bench.run("one") == [0], bench.log("one")
    assert bench.run("two", "batch.micro_size=4", ranks=2) == [0, 0], bench.log("two")
    one, two = (read_events(tmp_path / name, "adaptive_check") for name in ("one", "two"))
    assert [check["frozen_layers"] for check in one] == [check["frozen_layers"] for check in two]
    for alone, together in zip(one, two, strict=True):
        for mine, theirs in zip(alone["changes"] or (), together["changes"] or (), strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert theirs == pytest.approx(mine, rel=1e-3)
