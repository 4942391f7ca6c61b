"""`vitfreeze bench scaling` on two ranks with a tiny model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from processes import run_ranks

from vitfreeze.cli import EXIT_BAD_INPUT, main

pytestmark = pytest.mark.distributed
SETTINGS = (
    *("model.size=vit_tiny_test", "model.img_size=32", "batch.global_size=8", "batch.micro_size=2"),
    *("run.ds_config=cpu", "optim.warmup=1 steps", "run.length=100 steps"),
)


def measure(frozen: list[int] | None) -> tuple[dict[str, Any], str]:
    from vitfreeze.bench.scaling import format_scaling_benchmark, run_scaling_benchmark
    from vitfreeze.config import load_config

    config = load_config("paper", list(SETTINGS))
    result = run_scaling_benchmark(config, frozen_layers=frozen, rounds=2, warmup_rounds=1)
    return asdict(result), format_scaling_benchmark(result)


def test_holds_steps_on_two_ranks_against_the_plan() -> None:
    (result, table), (other, _) = run_ranks(measure, [4, 8])
    assert result == other, "every rank has the same figures"
    assert (result["world_size"], result["micro_batch"], result["accumulation"]) == (2, 2, 2)
    assert result["bandwidth_gigabytes"] > 0
    assert [row["frozen_layers"] for row in result["rows"]] == [0, 4, 8]
    for row in result["rows"]:
        sent_ms = row["sent_bytes"] / result["bandwidth_gigabytes"] / 1e6
        assert row["planned_ms"] == pytest.approx((max(row["alone_ms"], sent_ms), row["alone_ms"] + sent_ms))
        assert row["measured_efficiency"] == pytest.approx(row["alone_ms"] / row["measured_ms"])
    sent = [row["sent_bytes"] for row in result["rows"]]
    assert sent[0] > sent[1] > sent[2] > 0
    assert [line.split()[0] for line in table.splitlines()[-3:]] == ["0", "4", "8"]


def test_by_default_five_stages_of_the_schedule() -> None:
    (result, _), _ = run_ranks(measure, None)
    assert [row["frozen_layers"] for row in result["rows"]] == [0, 2, 4, 6, 8]


def choose_wrongly() -> str:
    with pytest.raises(ValueError, match="the recipe never has 9 layers frozen, but 0, 1, 2,") as refused:
        measure([3, 9])
    return str(refused.value)


def test_a_prefix_that_the_schedule_never_has() -> None:
    assert len(set(run_ranks(choose_wrongly))) == 1


def test_one_rank_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "scaling", "paper", *SETTINGS])
    assert ended.value.code == EXIT_BAD_INPUT
    assert "start it with a launcher" in capsys.readouterr().err
