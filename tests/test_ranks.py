"""Who the ranks are, and the facts that they pass to each other: alone, and on real process groups."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch.distributed import distributed_c10d

from vitfreeze.engine import join_ranks
from vitfreeze.ranks import ClusterError, LaunchEnvironment, Ranks, describe_ranks, group_ranks


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([7, 0, 1, 5], "ranks 0-1, 5, 7")],
)
def test_ranks_in_words(ranks: list[int], text: str) -> None:
    assert describe_ranks(ranks) == text


def test_ranks_in_words_with_their_hosts() -> None:
    hosts = ["a", "a", "b", "c"]
    assert describe_ranks([0, 1, 3], hosts=hosts) == "ranks 0-1, 3 (a, c)"
    assert describe_ranks([0, 1, 2, 3], hosts=hosts, max_hosts=1) == "ranks 0-3 (a and 2 more hosts)"


def test_groups_keep_the_order_of_appearance() -> None:
    assert group_ranks(["b", "a", "b"]) == {"b": [0, 2], "a": [1]}


def test_environment_is_read_from_either_launcher() -> None:
    common = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for launcher in ({"LOCAL_SIZE": "4", "LOCAL_RANK": "1"}, {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}):
        launch = LaunchEnvironment.read({**common, **launcher})
        assert (launch.rank, launch.local_rank, launch.local_size) == (5, 1, 4)
    alone = LaunchEnvironment.read({})
    assert (alone.rank, alone.world_size, alone.local_size) == (0, 1, 1)
    with pytest.raises(ClusterError, match="MASTER_PORT missing"):
        LaunchEnvironment.read({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"})


def collect(ranks: Ranks) -> dict[str, Any]:
    """Return the answer of every collective, given by rank r: the tensor [r, 1], the numbers r and -r, r + 1 rows."""
    rank = ranks.rank
    rows = torch.full((rank + 1, 2), float(rank))
    return {
        "sum": ranks.sum(torch.tensor([rank, 1])).tolist(),
        "mean": ranks.mean([rank, 0.1]),
        "max": ranks.begin_max([rank, -rank])(),
        "gather": ranks.gather({"rank": rank, "text": "\u00e4" * rank, "pair": (rank, None)}),
        "rows": [part.tolist() for part in ranks.gather_rows(rows)],
        "from_rank_0": ranks.from_rank_0(lambda: [rank, "told"]),
    }


def expected(world_size: int) -> dict[str, Any]:
    everyone = range(world_size)
    return {
        "sum": [sum(everyone), world_size],
        "mean": pytest.approx([(world_size - 1) / 2, 0.1], rel=1e-15),
        "max": [world_size - 1, 0],
        "gather": [{"rank": rank, "text": "\u00e4" * rank, "pair": [rank, None]} for rank in everyone],
        "rows": [[[rank, rank]] * (rank + 1) for rank in everyone],
        "from_rank_0": [0, "told"],
    }


def test_a_rank_alone_needs_no_process_group() -> None:
    alone = Ranks.alone(torch.device("cpu"))
    assert collect(alone) == expected(1)
    assert collect(alone.on_cpu()) == expected(1)
    with pytest.raises(KeyError, match="gone"):
        alone.from_rank_0(lambda: {}["gone"], errors=(ValueError, KeyError))


def talk() -> dict[str, Any]:
    """What each rank of a process group sees."""
    ranks = join_ranks()
    own = ranks.on_cpu(timeout=timedelta(minutes=1))
    mine = torch.tensor([1.0 + ranks.rank])
    ranks.sum(mine)
    failures = []
    for text in ("[]", "{"):
        try:
            ranks.from_rank_0(lambda text=text: json.loads(text)["key"], errors=(TypeError, ValueError))
        except (TypeError, ValueError) as error:
            failures.append(f"{type(error).__name__}: {error}")
    return {"default": collect(ranks), "own": collect(own), "mine": mine.item() - ranks.rank, "failures": failures}


@pytest.mark.distributed
def test_ranks_pass_facts_on_the_default_group_and_on_their_own() -> None:
    for answer in run_ranks(talk, world_size=3):
        assert answer["default"] == answer["own"] == expected(3)
        assert answer["mine"] == 1  # what is given is not written to
        assert answer["failures"] == [
            "TypeError: list indices must be integers or slices, not str",
            # a JSONDecodeError there, which is a ValueError
            "ValueError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ]


def ask_late() -> bytes:
    """Rank 1 asks rank 0's store when rank 0 has nothing left to do."""
    ranks = join_ranks()
    store = distributed_c10d._get_default_store()
    if ranks.rank == 0:
        store.set("word", "there")
        return b"there"
    time.sleep(0.5)
    return store.get("word")


@pytest.mark.distributed
def test_ranks_of_tests_leave_together() -> None:
    assert run_ranks(ask_late) == [b"there"] * 2


def timeouts_of_groups() -> list[float]:
    from datetime import timedelta

    import engine_scenarios as scenarios

    from vitfreeze.engine import FreezingEngine
    from vitfreeze.ranks import set_group_timeouts

    engine = scenarios.build(FreezingEngine, scenarios.ds_config(1, "fp32"))
    engine.ranks.on_cpu()
    set_group_timeouts(timedelta(minutes=90))
    groups = [*distributed_c10d._world.pg_map]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.mark.distributed
def test_every_group_waits_longer_than_the_watchdog() -> None:
    for timeouts in run_ranks(timeouts_of_groups):
        assert len(timeouts) == 3, "the default group, ZeRO's, and ours"
        assert set(timeouts) == {90 * 60.0}
