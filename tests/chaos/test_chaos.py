"""Runs that are hurt in every way that we know end as undisturbed ones do; the driver beside this file plays longer."""

from __future__ import annotations

import pytest
from driver import Chaos, summarize

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos(tmp_path_factory.mktemp("chaos"), seed=0)


def test_short_chaos(chaos: Chaos) -> None:
    injuries = ["kill", "truncate a file", "kill in a save", "remove the pointer", "drop a shard"]
    assert chaos.play("short", injuries, change_ranks=False).problem == ""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_long_chaos(chaos: Chaos) -> None:
    kinds = [kind for kind in chaos.injuries if kind != "fill the disk" or chaos.can_mount()]
    rounds = [
        chaos.play(f"round-{number}", [kind, chaos.random.choice(kinds)], change_ranks=number % 3 == 2)
        for number, kind in enumerate(kinds * 2)
    ]
    assert [this.problem for this in rounds if this.problem] == []
    assert summarize(rounds)["runs lost"] == 0
