"""What a run writes down."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vitfreeze.files import read_json_lines, trim_json_lines
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
