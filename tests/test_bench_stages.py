"""The benchmark of a recipe's kinds of step: which there are, what four runs cost by them, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from processes import run_ranks

from vitfreeze.config import load_config
from vitfreeze.planner import plan

if TYPE_CHECKING:
    from vitfreeze.bench.stages import StageBenchmark

SETTINGS = (
    *("model.size=vit_tiny_test", "model.img_size=64", "batch.global_size=4", "batch.micro_size=4"),
    *("run.ds_config=cpu", "curriculum.img_size=[[0, 32], [0.5, 64]]", "curriculum.decoded_share=[[0, 0.5], [0.5, 1]]"),
)


def measure() -> tuple[StageBenchmark, str]:
    from vitfreeze.bench.stages import format_stage_benchmark, run_stage_benchmark

    result = run_stage_benchmark(load_config("paper", SETTINGS), rounds=1)
    return result, format_stage_benchmark(result)


@pytest.mark.distributed
def test_every_kind_of_step_is_measured_once_and_the_runs_are_their_sums() -> None:
    ((result, table),) = run_ranks(measure, world_size=1)
    small, large = (32, 0.75, 0.5), (64, 0.75, 1.0)
    assert [tuple(row.kind) for row in result.kinds] == [(0, *small)] + [(frozen, *large) for frozen in range(9)]
    plain = next(row for row in result.kinds if tuple(row.kind) == (0, *large))
    assert plain.planned == 1
    both = plan(load_config("paper", SETTINGS))
    measured = {(row.kind.frozen_layers, row.kind.img_size): row.measured for row in result.kinds}
    costs = {cost.run: cost for cost in result.runs}
    assert list(costs) == ["plain", "frozen", "curriculum", "both"]
    assert costs["both"].planned == pytest.approx(1 - both.flops_saving)
    assert costs["curriculum"].measured == pytest.approx((measured[0, 32] + measured[0, 64]) / 2)
    expected = sum(stage.steps * measured[stage.frozen_layers, stage.images.img_size] for stage in both.stages)
    assert costs["both"].measured == pytest.approx(expected / both.total_steps)
    assert [line.split()[0] for line in table.splitlines()[-4:]] == list(costs)


def test_no_such_clock() -> None:
    from vitfreeze.bench.stages import run_stage_benchmark

    with pytest.raises(ValueError, match="'sundial': allowed are wall, processor"):
        run_stage_benchmark(load_config("half"), clock="sundial")
