"""A run that is killed right after the save of a step, one step after the other, ends as an undisturbed one does."""

from __future__ import annotations

import pytest
from driver import CURRICULUM
from jobs import KILLED, Bench, Kill, newest_checkpoint, read_events, read_losses

pytestmark = pytest.mark.distributed
EVERY_STEP = ("checkpoint.every=1 steps",)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("every-step"))


def resume_at(bench: Bench, run: str, steps: range, *settings: str) -> None:
    assert bench.run(f"{run}-undisturbed", *settings) == [0], bench.log(f"{run}-undisturbed")
    for step in steps:
        job = bench.start(run, *EVERY_STEP, *settings, kill=Kill(where="write_pointer", step=step))
        job.processes[0].join(120)
        job.kill()
        assert job.processes[0].exitcode == KILLED, bench.log(run)
    assert bench.run(run, *EVERY_STEP, *settings) == [0], bench.log(run)
    mine, theirs = bench.folder / run, bench.folder / f"{run}-undisturbed"
    assert [event["step"] for event in read_events(mine, "resume")] == list(steps)
    froze = [[event["step"] for event in read_events(folder, "freeze")] for folder in (mine, theirs)]
    assert froze[0] == froze[1]
    assert set(froze[0]) & {step + 1 for step in steps}, "no layer freezes right behind a resume"
    assert read_losses(mine) == read_losses(theirs)
    assert list(read_losses(mine)) == list(range(1, 17))
    files = [newest_checkpoint(folder) / "weights.safetensors" for folder in (mine, theirs)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resume_at_steps_around_freezes(bench: Bench) -> None:
    resume_at(bench, "some", range(5, 9))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("settings", [(), CURRICULUM], ids=["plain", "curriculum-and-wsd"])
def test_resume_at_every_step(bench: Bench, settings: tuple[str, ...]) -> None:
    resume_at(bench, f"every-{len(settings)}", range(1, 16), *settings)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_two_four_and_one_ranks(bench: Bench) -> None:
    small = "batch.micro_size=2"
    assert bench.run("alone", small) == [0], bench.log("alone")
    for ranks, step in ((1, 3), (2, 6), (4, 9)):
        job = bench.start("changing", small, ranks=ranks, kill=Kill(where="write_pointer", step=step))
        job.processes[0].join(240)
        job.kill()
        assert job.processes[0].exitcode == KILLED, bench.log("changing")
    assert bench.run("changing", small) == [0], bench.log("changing")
    resumed = read_events(bench.folder / "changing", "resume")
    assert [(event["step"], event["world_size"]) for event in resumed] == [(3, 1), (6, 2), (9, 4)]
    mine, theirs = (read_losses(bench.folder / run) for run in ("changing", "alone"))
    assert list(mine) == list(theirs)
    for step, figures in theirs.items():
        assert mine[step]["loss"] == pytest.approx(figures["loss"], rel=1e-5), f"step {step}"
        assert (mine[step]["lr"], mine[step]["frozen_layers"]) == (figures["lr"], figures["frozen_layers"])
