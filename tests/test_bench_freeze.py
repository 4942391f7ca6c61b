"""`vitfreeze bench freeze` on a tiny model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from processes import run_ranks

pytestmark = pytest.mark.distributed


def measure() -> list[dict[str, Any]]:
    from vitfreeze.bench.freeze import format_drops, measure_drops

    costs = measure_drops("vit_tiny_test", img_size=32, micro_batch=2, steps=1)
    return [json.loads(line) for line in format_drops(costs, as_json=True)]


def test_every_drop_is_timed_and_frees_state() -> None:
    (costs,) = run_ranks(measure, world_size=1)
    assert [cost["frozen_layers"] for cost in costs] == list(range(1, 9))
    state = [cost["optimizer_state_bytes"] for cost in costs]
    assert state == sorted(state, reverse=True)
    assert all(cost["optimizer_state_bytes"] == 12 * cost["trainable_parameters"] for cost in costs)
    assert all(cost["drop_seconds"] > 0 and cost["step_seconds"] > 0 for cost in costs)


@pytest.mark.parametrize(("settings", "sentence"), [({"size": "vit_odd"}, "vit_odd"), ({"steps": 0}, "steps 0")])
def test_bad_input_is_refused(settings: dict[str, Any], sentence: str) -> None:
    from vitfreeze.bench.freeze import measure_drops

    with pytest.raises(ValueError, match=sentence):
        next(measure_drops(settings.pop("size", "vit_tiny_test"), **settings))


def test_command_line_refuses_an_unknown_size(capsys: pytest.CaptureFixture[str]) -> None:
    from vitfreeze.cli import EXIT_BAD_INPUT, main

    with pytest.raises(SystemExit) as ended:
        main(["bench", "freeze", "--size", "vit_odd"])
    assert ended.value.code == EXIT_BAD_INPUT
    assert "size 'vit_odd': allowed are vit_tiny_test" in capsys.readouterr().err
