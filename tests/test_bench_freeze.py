"""`vitfreeze bench freeze` on a tiny model."""

from __future__ import annotations

import pytest
from processes import run_ranks

from vitfreeze.cli import EXIT_BAD_INPUT, main

pytestmark = pytest.mark.distributed
SETTINGS = (
    *("model.size=vit_tiny_test", "model.img_size=32", "batch.global_size=2", "batch.micro_size=2"),
    *("run.ds_config=cpu", "freeze.min_steps_between_drops=100"),
)


def test_every_drop_is_timed_and_frees_state() -> None:
    ((costs, table),) = run_ranks(measure, world_size=1)
    assert [cost.frozen_layers for cost in costs] == list(range(1, 9))
    state = [cost.optimizer_state_bytes for cost in costs]
    assert state == sorted(state, reverse=True)
    assert all(cost.optimizer_state_bytes == 12 * cost.trainable_parameters for cost in costs)
    assert all(cost.drop_seconds > 0 and cost.step_seconds > 0 for cost in costs)
    assert [line.split()[0] for line in table.splitlines()[-8:]] == list("12345678")


def measure() -> tuple[tuple, str]:
    from vitfreeze.bench.freeze import format_freeze_benchmark, run_freeze_benchmark
    from vitfreeze.config import load_config

    result = run_freeze_benchmark(load_config("paper", SETTINGS), rounds=1)
    return result.rows, format_freeze_benchmark(result)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["paper", "model.size=vit_odd"], "model.size is 'vit_odd'"),
        (["paper", "--rounds", "0"], "rounds is 0, expected at least 1"),
        (["finetune_l"], "'pretrain'"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "freeze", *arguments])
    assert ended.value.code == EXIT_BAD_INPUT
    assert sentence in capsys.readouterr().err
