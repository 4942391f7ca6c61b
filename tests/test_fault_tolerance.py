"""Requests to stop, hangs, and losses that are not finite. Real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from jobs import Bench, Job, Kill, newest_checkpoint, read_events, read_lines, read_losses
from tiny_shards import open_loader, spoil

from vitfreeze.fault_tolerance import EXIT_HUNG, EXIT_STOPPED, LossGuard, StopSignals, Watchdog

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("survival"))


def wait_for_step(bench: Bench, run: str, job: Job, step: int) -> None:
    deadline = time.monotonic() + 90
    while max(read_losses(bench.folder / run), default=0) < step:
        assert time.monotonic() < deadline, bench.log(run)
        assert any(process.exitcode is None for process in job.processes), bench.log(run)
        time.sleep(0.01)


def in_child(function: Callable[[], None]) -> int:
    """Run a function in a forked process and return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_one_rank_hears_the_request_and_all_save_and_stop(bench: Bench) -> None:
    run_dir = bench.folder / "stopped"
    for number, rank in ((signal.SIGUSR1, 1), (signal.SIGTERM, 0)):
        before = max(read_losses(run_dir), default=0)
        job = bench.start("stopped", "checkpoint.every=100 steps", ranks=2)
        wait_for_step(bench, "stopped", job, before + 2)
        job.signal(number, ranks=[rank])
        assert job.wait() == [EXIT_STOPPED, EXIT_STOPPED], bench.log("stopped")
        taken = max(read_losses(run_dir))
        assert newest_checkpoint(run_dir).name == f"step-{taken:08d}"  # no step is lost
        assert read_events(run_dir, "stop")[-1]["step"] == taken
    assert bench.run("stopped", ranks=2) == [0, 0]
    assert list(read_losses(run_dir)) == list(range(1, 17))


def test_a_signal_to_the_data_workers_too_still_leads_to_a_save(bench: Bench) -> None:
    """Terminals and schedulers signal every process of a job at once."""
    job = bench.start("group", "data.workers=2", "data.prefetch=1", "checkpoint.every=100 steps")
    wait_for_step(bench, "group", job, 2)
    parent = psutil.Process(job.processes[0].pid)
    workers = parent.children(recursive=True)
    assert len(workers) >= 2
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        for process in (*workers, parent):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    assert job.wait() == [EXIT_STOPPED], bench.log("group")
    assert newest_checkpoint(bench.folder / "group").is_dir()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_the_launchers_sigterm_after_ctrl_c_is_no_second_ctrl_c(bench: Bench) -> None:
    job = bench.start("interrupted")
    wait_for_step(bench, "interrupted", job, 2)
    job.signal(signal.SIGINT)
    job.signal(signal.SIGTERM)
    job.signal(signal.SIGINT)  # the terminal's, passed on once more by a launcher
    assert job.wait() == [EXIT_STOPPED]


def test_a_second_ctrl_c_stops_at_once_even_where_no_python_runs() -> None:
    def wait_in_c() -> None:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.2)
            assert signals.received == "SIGINT"
            if os.fork() == 0:  # a helper that presses Ctrl-C once more while the parent waits in a lock
                time.sleep(0.2)
                os.kill(os.getppid(), signal.SIGINT)
                os._exit(0)
            os.read(os.pipe()[0], 1)

    started = time.monotonic()
    assert in_child(wait_in_c) == 130
    assert time.monotonic() - started < 10


def test_signal_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in StopSignals.SIGNALS]
    with StopSignals() as signals:
        assert signals.received == ""
    assert [signal.getsignal(number) for number in StopSignals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_hang_is_reported_and_ends_the_job(tmp_path: Path) -> None:
    def hang_in_here() -> None:
        watchdog = Watchdog(
            tmp_path, rank=3, minutes=0.3 / 60, exit_status=EXIT_HUNG, grace_seconds=0.1,
            on_hang=lambda step: (tmp_path / "told").write_text(str(step)) and None,
        )  # fmt: skip
        with watchdog:
            watchdog.beat(17)
            time.sleep(30)

    assert in_child(hang_in_here) == EXIT_HUNG
    report = (tmp_path / "hang-rank-00003.txt").read_text()
    assert "rank 3: no step ended for 0.005 minutes; 17 steps were taken" in report
    assert "hang_in_here" in report
    assert (tmp_path / "told").read_text() == "17"


def test_a_job_that_was_suspended_is_not_taken_for_a_hang(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with Watchdog(tmp_path, rank=0, minutes=1.0 / 60, exit_status=EXIT_HUNG, grace_seconds=0) as watchdog:
            for step in range(25):
                time.sleep(0.1)
                watchdog.beat(step)
        os._exit(0)
    time.sleep(0.5)
    os.kill(child, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_beats_keep_the_watchdog_quiet(tmp_path: Path) -> None:
    def beat_for_longer_than_it_waits() -> None:
        with Watchdog(tmp_path, rank=0, minutes=1.5 / 60, exit_status=EXIT_HUNG) as watchdog:
            for step in range(20):
                time.sleep(0.1)
                watchdog.beat(step)
        os._exit(0)

    assert in_child(beat_for_longer_than_it_waits) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_stands_still_is_found_by_the_other(bench: Bench) -> None:
    job = bench.start("hung", "run.watchdog_minutes=0.1", ranks=2)
    wait_for_step(bench, "hung", job, 4)
    job.signal(signal.SIGSTOP, ranks=[1])
    job.processes[0].join(60)
    job.kill()
    assert job.processes[0].exitcode == EXIT_HUNG, bench.log("hung")
    report = (bench.folder / "hung" / "hang-rank-00000.txt").read_text()
    assert "take_step" in report or "end_step" in report or "freeze" in report
    assert read_events(bench.folder / "hung", "hang")[0]["step"] >= 3
    assert bench.run("hung", ranks=2) == [0, 0]


def test_what_one_rank_alone_meets_in_a_shard_is_told_by_it(bench: Bench) -> None:
    """The launcher ends the other ranks, so nobody else could."""
    shards = shutil.copytree(bench.folder / "shards", bench.folder / "spoilt")
    loader = open_loader(
        shards, img_size=32, num_patches=64, global_batch=8, micro_batch=4, workers=0, rank=1, world_size=2,
        cache_dir=bench.folder / "cache",
    )  # fmt: skip
    spoilt = next(loader.batches(2, 3)).keys[0]
    for path in shards.glob("*.tar"):
        spoil(path, f"{spoilt}.jpg")
    job = bench.start("spoilt_run", f"data.train={shards}", "data.max_bad_fraction=0.001", ranks=2)
    job.processes[1].join(60)
    job.kill()
    assert job.processes[1].exitcode == 2, bench.log("spoilt_run")
    said = re.findall(r"^vitfreeze pretrain: 1 of 80 samples .*$", bench.log("spoilt_run"), re.MULTILINE)
    assert len(said) == 1, bench.log("spoilt_run")
    assert "over data.max_bad_fraction=0.001" in said[0]
    assert str(shards) in said[0]


def test_a_loss_that_is_not_finite_is_named_and_the_checkpoint_is_from_before(bench: Bench) -> None:
    """A learning rate beyond all reason spoils the weights as a real divergence does."""
    options = ("optim.blr=1e30", "optim.warmup=2 steps", "checkpoint.every=1 steps")
    assert bench.run("diverged", *options, ranks=2) == [1, 1], bench.log("diverged")
    failure = read_events(bench.folder / "diverged", "failure")[0]
    assert failure["reason"] == "loss_not_finite"
    assert failure["ranks"] == [0, 1]
    for rank in failure["ranks"]:
        path = bench.folder / "diverged" / "failures" / f"step-{failure['step']:08d}-rank-{rank:05d}.json"
        facts = json.loads(path.read_text())
        assert [len(batch["keys"]) for batch in facts["micro_batches"]] == [4]
        assert any(value in ("nan", "inf") for batch in facts["micro_batches"] for value in batch["losses"].values())
    saved = int(newest_checkpoint(bench.folder / "diverged").name.removeprefix("step-"))
    assert saved <= failure["step"]
    assert f"the loss of step {failure['step']} was not finite" in bench.log("diverged")


def fp16_with_scale(bench: Bench, power: int) -> str:
    """Write a DeepSpeed JSON whose loss scale begins at 2^power and is halved at each overflow."""
    scaler = {"enabled": True, "initial_scale_power": power, "hysteresis": 1, "loss_scale_window": 1000}
    path = bench.folder / f"fp16-{power}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": scaler, "gradient_clipping": 0}))
    return f"run.ds_config={path}"


def test_overflows_of_fp16_are_skipped_and_counted_and_the_scale_outlives_a_kill(bench: Bench) -> None:
    options = ("freeze.mode=off", fp16_with_scale(bench, 26))
    assert bench.run("fp16", *options, stage=None) == [0], bench.log("fp16")
    skipped = read_events(bench.folder / "fp16", "skipped")
    lines = read_lines(bench.folder / "fp16" / "metrics.jsonl")
    assert 0 < len(skipped) < 16
    assert lines[-1]["skipped_steps"] == len(skipped)
    assert lines[-1]["loss_scale"] == 2.0 ** (26 - len(skipped))

    job = bench.start("fp16-killed", *options, stage=None, kill=Kill(where="update", step=6))
    job.processes[0].join(120)
    assert bench.run("fp16-killed", *options, stage=None) == [0]
    assert read_losses(bench.folder / "fp16-killed") == read_losses(bench.folder / "fp16")


def test_too_many_skipped_steps_in_a_row_end_the_run(bench: Bench) -> None:
    options = ("run.max_skipped_steps=3", "checkpoint.every=1 steps", fp16_with_scale(bench, 60))
    assert bench.run("overflow", *options, stage=None) == [1]
    assert len(read_events(bench.folder / "overflow", "skipped")) == 4
    failure = read_events(bench.folder / "overflow", "failure")[0]
    assert (failure["reason"], failure["skipped"]) == ("skipped_steps", 4)
    assert "4 steps in a row were skipped" in bench.log("overflow")
    assert not (bench.folder / "overflow" / "checkpoints").exists()  # nothing doubtful was saved


def test_a_full_disk_does_not_end_the_run(bench: Bench) -> None:
    """The system refuses files over a size, as a disk that is full would; later there is room again."""
    job = bench.start("full", kill=Kill(where="refuse_files", step=3, index=6))
    assert job.wait() == [0], bench.log("full")
    failed = read_events(bench.folder / "full", "save_failed")
    assert [event["step"] for event in failed] == [3, 6]
    assert bench.log("full").count("checkpoints cannot be written") == 1
    assert read_events(bench.folder / "full", "save")[-1]["step"] == 16


def test_a_killed_data_worker_costs_a_sentence(bench: Bench) -> None:
    job = bench.start("worker", "data.workers=1", "run.length=200 steps")
    wait_for_step(bench, "worker", job, 2)
    for worker in psutil.Process(job.processes[0].pid).children():
        worker.kill()
    assert job.wait() == [1], bench.log("worker")
    assert "the run has ended: a decoding process is gone" in bench.log("worker")
    assert "Traceback" not in bench.log("worker")


def test_every_step_can_be_saved(bench: Bench) -> None:
    assert bench.run("every", "checkpoint.every=1 steps", "checkpoint.keep=100") == [0], bench.log("every")
    assert [event["step"] for event in read_events(bench.folder / "every", "save")] == list(range(1, 17))


def test_a_run_folder_that_is_deleted_is_noticed_and_the_last_state_is_kept(bench: Bench) -> None:
    run_dir = bench.folder / "deleted"
    job = bench.start("deleted")
    wait_for_step(bench, "deleted", job, 2)
    job.signal(signal.SIGSTOP)
    shutil.rmtree(run_dir)
    job.signal(signal.SIGCONT)
    assert job.wait() == [0], bench.log("deleted")
    assert bench.log("deleted").count("is gone, deleted or moved") == 1
    assert "is made anew for the last state" in bench.log("deleted")
    assert newest_checkpoint(run_dir).name == "step-00000016"
    steps = list(read_losses(run_dir))
    assert steps == list(range(steps[0], 17))
    assert list((run_dir / "tensorboard").iterdir()), "what TensorBoard shows of the steps after that is lost"


def test_the_guard_judges_a_step_when_the_next_one_is_on_its_way(tmp_path: Path) -> None:
    guard = LossGuard(tmp_path, rank=0, max_skipped_steps=1, forgives_skipped=False)
    for step, loss in enumerate((1.0, float("inf"), 1.0)):
        guard.add(step, keys=["a"], losses={"loss": torch.tensor(loss)})
        guard.close_step(was_skipped=False)
        assert guard.find_failure(include_last=False) == (1 if step == 2 else None)
    assert "step-00000001-rank-00000.json" in guard.describe(1).name


@pytest.mark.parametrize("forgives", [True, False])
def test_the_guard_judges_the_last_step_on_demand_and_forgives_skipped_ones(tmp_path: Path, forgives: bool) -> None:
    guard = LossGuard(tmp_path, rank=0, max_skipped_steps=1, forgives_skipped=forgives)
    guard.add(0, keys=["a"], losses={"loss": torch.tensor(float("nan"))})
    guard.close_step(was_skipped=True)
    assert guard.find_failure(include_last=True) == (None if forgives else 0)
    assert not guard.has_skipped_too_often
    guard.add(1, keys=["a"], losses={"loss": torch.tensor(float("nan"))})
    guard.close_step(was_skipped=False)
    assert guard.find_failure(include_last=False) == (None if forgives else 0)
    assert guard.find_failure(include_last=True) == (1 if forgives else 0)


def test_the_guard_learns_later_what_only_the_device_knows(tmp_path: Path) -> None:
    guard = LossGuard(tmp_path, rank=0, max_skipped_steps=1, forgives_skipped=False)
    for step, flag in enumerate((0.0, 1.0, 1.0)):
        guard.add(step, keys=["a"], losses={"loss": torch.tensor(1.0)})
        guard.close_step(was_skipped=torch.tensor(flag))
        assert guard.find_failure(include_last=False) is None
        assert guard.take_skipped() == ([1] if step == 2 else [])
    assert not guard.has_skipped_too_often
    assert guard.find_failure(include_last=True) is None
    assert guard.take_skipped() == [2]
    assert guard.has_skipped_too_often
