"""Runs that are hurt in every way that we know end as undisturbed ones do; the driver beside this file plays longer."""

from __future__ import annotations

import pytest
from driver import Chaos, choose_round, summarize
from injuries import choose_kinds

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    return Chaos(tmp_path_factory.mktemp("chaos"), seed=0)


def test_short_chaos(chaos: Chaos) -> None:
    injuries = ["kill in a save", "truncate a file", "drop a shard", "kill a data worker"]
    assert chaos.play("short", injuries, ranks=[1]).problem == ""


def test_chaos_of_clock_data_and_folder(chaos: Chaos) -> None:
    injuries = ["set the clock forward", "swap the data", "delete the folder"]
    assert chaos.play("odd", injuries, ranks=[2], schedule="curriculum and wsd").problem == ""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_long_chaos(chaos: Chaos) -> None:
    kinds = choose_kinds(chaos.bench.folder)
    rounds = [chaos.play(f"round-{n}", **choose_round(n, kinds=kinds, seed=0)) for n in range(2 * len(kinds))]
    assert [this.problem for this in rounds if this.problem] == []
    assert summarize(rounds)["runs lost or silently changed"] == 0
