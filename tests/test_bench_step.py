"""The step benchmark: what it prints can be read, and what it must refuse it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processes import run_ranks

from vitfreeze.config import load_config
from vitfreeze.planner import read_step_times

if TYPE_CHECKING:
    from vitfreeze.bench.step import StepBenchmark

pytestmark = pytest.mark.distributed
SETTINGS = (
    *("model.size=vit_tiny_test", "model.img_size=64", "batch.global_size=4", "batch.micro_size=2"),
    *("run.ds_config=cpu", "freeze.min_steps_between_drops=100"),
)


def measure() -> tuple[StepBenchmark, str]:
    from vitfreeze.bench import step

    step._UNIT_BLOCKS = 1  # the whole unit takes seconds, and is no subject here
    result = step.run_step_benchmark(load_config("paper", SETTINGS), frozen_layers=[8], rounds=1, warmup_rounds=0)
    return result, step.format_step_benchmark(result)


def test_measures_every_prefix_and_the_planner_reads_it(tmp_path: Path) -> None:
    ((result, table),) = run_ranks(measure, world_size=1)
    assert (result.micro_batch, result.accumulation, result.zero_stage, result.precision) == (2, 2, 1, "fp32")
    assert [row.frozen_layers for row in result.rows] == [0, 8]
    start, last = result.rows
    assert start.ratio == start.ratio_of_flops == 1
    assert 0.2 < last.ratio_of_flops < 0.6
    assert last.step_ms < start.step_ms
    for row in result.rows:
        parts = row.targets_ms + row.forward_ms + row.backward_ms + row.optimizer_ms
        assert parts == pytest.approx(row.step_ms)
        assert row.images_per_second == pytest.approx(4000 / row.step_ms)
        assert row.ratio == pytest.approx(row.in_units / start.in_units)
        assert row.peak_memory_bytes is None or row.peak_memory_bytes > 1e7
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(asdict(result)))
    times = read_step_times(path)
    assert times.step_ms == {0: start.step_ms, 8: last.step_ms}
    assert times.images == 4
    assert result.device in table
    assert [line.split()[0] for line in table.splitlines()[-2:]] == ["0", "8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clock": "sundial"}, "clock 'sundial': allowed are wall, processor"),
        ({"frozen_layers": [9]}, "9 frozen layers are not possible, expected 0 to depth 8"),
        ({"rounds": 0}, "rounds is 0, expected at least 1"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    from vitfreeze.bench.step import run_step_benchmark

    with pytest.raises(ValueError, match=message):
        run_step_benchmark(load_config("paper", SETTINGS), **options)


def test_frozen_layers_that_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    from vitfreeze.cli import main

    with pytest.raises(SystemExit):
        main(["bench", "step", "paper", "--frozen", "0,all"])
    assert "--frozen: '0,all', expected whole numbers with commas" in capsys.readouterr().err
