"""What a run writes down."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitfreeze.files import LineFile, RecordFile, read_json_lines, trim_json_lines
from vitfreeze.ranks import Ranks
from vitfreeze.report import Meter, Reporter, WaitWatch, flatten_numbers


def test_meter_takes_means_over_micro_batches_and_starts_again() -> None:
    meter = Meter()
    for value in (1.0, 3.0):
        meter.add_losses({"loss": torch.tensor(value), "4": torch.tensor(value / 2)})
    meter.add_step(images=64, wait_seconds=0.0)
    figures = meter.read(Ranks.alone(torch.device("cpu")))
    assert figures["loss"] == 2.0
    assert figures["losses"] == {"4": 1.0}
    assert figures["images_per_second"] > 0
    meter.add_losses({"loss": torch.tensor(5.0)})
    meter.add_step(images=64, wait_seconds=1e9)
    figures = meter.read(Ranks.alone(torch.device("cpu")))
    assert figures["loss"] == 5.0
    assert figures["losses"] == {}
    assert figures["data_wait_fraction"] == 1.0


def test_waiting_is_noticed_once_and_only_when_it_lasts() -> None:
    watch = WaitWatch(threshold=0.05, patience=3)
    readings = [0.9, 0.9, 0.01, 0.9, 0.9, 0.9, 0.9, 0.9]
    assert [watch.update(reading) for reading in readings] == [False] * 5 + [True, False, False]


def test_lines_cut_short_by_a_kill_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    trim_json_lines(path, keep=lambda line: line["step"] < 2)
    assert path.read_text() == '{"step": 1}\n'
    assert read_json_lines(tmp_path / "nothing.jsonl") == []


def test_resume_cuts_what_will_be_taken_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (5, 10, 15)))
    events = [{"event": "freeze", "step": 8}, {"event": "freeze", "step": 12}, {"event": "save", "step": 12}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    reporter = Reporter(tmp_path, rank=0, start_step=10, total_steps=20)
    reporter.close()
    assert [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == [5, 10]
    kept = [(line["event"], line["step"]) for line in read_json_lines(tmp_path / "events.jsonl")]
    assert ("freeze", 8) in kept
    assert ("save", 12) in kept
    assert ("freeze", 12) not in kept


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, rank=1, start_step=0, total_steps=2)
    reporter.log_event("freeze", 1)
    reporter.log_metrics(1, loss=1.0, images_per_second=1.0, frozen_layers=0)
    reporter.close()
    assert list(tmp_path.iterdir()) == []


def test_numbers_in_nested_figures() -> None:
    figures = {"a": 1, "b": {"c": 2.5, "d": float("nan"), "e": "text", "f": True}}
    assert dict(flatten_numbers(figures)) == {"a": 1.0, "b/c": 2.5}


def log_steps(run_dir: Path, steps: range, *, start_step: int, **figures: Any) -> Reporter:
    """Report steps as a run does, without an end, which a killed run has not."""
    reporter = Reporter(run_dir, rank=0, start_step=start_step, total_steps=100)
    for step in steps:
        reporter.log_metrics(step, **({"loss": float(step), "images_per_second": 1.0, "frozen_layers": 0} | figures))
    return reporter


def points_of(run_dir: Path, name: str = "loss") -> list[tuple[int, float]]:
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_tensorboard_loses_no_point_at_a_kill_and_a_resume(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 8), start_step=0)  # killed at step 7, saved at step 5
    log_steps(tmp_path, range(6, 9), start_step=5)
    log_steps(tmp_path, range(8, 11), start_step=7).close()
    assert points_of(tmp_path) == [(step, float(step)) for step in range(1, 11)]
    assert [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == list(range(1, 11))


def test_tensorboard_loses_no_point_when_the_clock_is_set_back(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 6), start_step=0)
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.rename(path.with_name("events.out.tfevents.4102444800.host.1.0"))  # in the year 2100
    log_steps(tmp_path, range(4, 9), start_step=3)
    assert points_of(tmp_path) == [(step, float(step)) for step in range(1, 9)]


def test_tensorboard_shows_pictures(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, rank=0, start_step=0, total_steps=2)
    reporter.log_image("reconstruction", 2, torch.rand(3, 4, 6))
    reporter.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (picture,) = board.Images("reconstruction")
    assert (picture.step, picture.width, picture.height) == (2, 6, 4)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_lines_are_strict_json_when_a_loss_is_not_finite(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    log_steps(tmp_path, range(1, 2), start_step=0, loss=nan, losses={"4": -inf, "8": 1.0}, lr=[0.1, inf]).close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=refuse)
    assert (read["loss"], read["losses"], read["lr"]) == (None, {"4": None, "8": 1.0}, [0.1, None])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')  # of an older version
    log_steps(tmp_path, range(2, 3), start_step=1).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["step"] for line in lines] == [1, 2]


def test_a_full_device_costs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    file = RecordFile(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            file.append(b"record")
    assert [record.getMessage() for record in caplog.records] == [
        "/dev/full cannot be written (No space left on device); the run goes on, and writes what its logs and "
        "checkpoints lack as soon as it can"
    ]


def test_a_folder_that_is_gone_loses_no_line_when_it_is_back(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "run" / "metrics.jsonl")
    lines.append_line({"step": 1})
    (tmp_path / "run").mkdir()
    lines.append_line({"step": 2})
    assert [line["step"] for line in read_json_lines(lines.path)] == [1, 2]


FULL_FOR_A_WHILE = """
import resource, sys
from pathlib import Path
from vitfreeze.report import Reporter

reporter = Reporter(Path(sys.argv[1]), rank=0, start_step=0, total_steps=400)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for step in range(1, 401):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if step < 400 else hard, hard))
    losses = {str(scale): 0.5 for scale in range(10)}
    reporter.log_metrics(step, loss=1.0, losses=losses, images_per_second=1.0, frozen_layers=0)
    reporter.log_event("freeze", step)
reporter.close()
"""


def test_a_disk_that_is_full_for_a_while_costs_one_line_and_no_figure(tmp_path: Path) -> None:
    """The system refuses to let files grow over a size, as a full disk does."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, "-c", FULL_FOR_A_WHILE, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    told = [line for line in ended.stderr.splitlines() if "cannot be written" in line]
    assert len(told) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == len(read_json_lines(tmp_path / "events.jsonl")) == 400
    assert [step for step, _ in points_of(tmp_path, "losses/7")] == list(range(1, 401))
