"""What ranks settle before they train: threads stand for ranks, each with its own connection to a real store."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from processes import free_port
from tiny_shards import write_shards

from vitfreeze.config import build_config
from vitfreeze.ranks import ClusterError, LaunchEnvironment
from vitfreeze.rendezvous import Rendezvous, fingerprint_shards, run_facts, software_versions


def launch_of(rank: int, *, world_size: int, port: int, local_size: int = 1) -> LaunchEnvironment:
    return LaunchEnvironment(
        rank=rank, world_size=world_size, local_rank=rank % local_size, local_size=local_size,
        master_addr="127.0.0.1", master_port=port,
    )  # fmt: skip


def meet(
    world_size: int,
    talk: Callable[[Rendezvous], Any],
    *,
    ranks: list[int] | None = None,
    seconds: float = 20,
    **options: Any,
) -> list[Any]:
    """Let each rank talk; return what each returned or raised."""
    port = options.pop("port", None) or free_port()
    ranks = list(range(world_size)) if ranks is None else ranks
    leave = threading.Barrier(len(ranks))  # the store ends with rank 0's thread only because the process goes on

    def run(rank: int) -> Any:
        try:
            launch = launch_of(rank, world_size=world_size, port=port, **options)
            rendezvous = Rendezvous("test", launch=launch, timeout=timedelta(seconds=seconds))
            return talk(rendezvous)
        except ValueError as error:
            return error
        finally:
            leave.wait()

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, ranks))


def test_every_rank_is_waited_for() -> None:
    assert meet(3, lambda rendezvous: rendezvous.wait_for_ranks()) == [[socket.gethostname()] * 3] * 3


def test_missing_ranks_and_their_nodes_are_named() -> None:
    answers = meet(6, lambda rendezvous: rendezvous.wait_for_ranks(), ranks=[0, 1, 4, 5], seconds=1, local_size=2)
    for answer in answers:
        assert isinstance(answer, ClusterError)
        assert "ranks 2-3 of 6 (node 1, counted from 0 in the hostfile) did not start within" in str(answer)


def test_a_master_that_is_not_there_is_named() -> None:
    port = free_port()
    (answer,) = meet(2, lambda rendezvous: rendezvous.wait_for_ranks(), ranks=[1], seconds=0.5, port=port)
    assert isinstance(answer, ClusterError)
    assert f"did not reach rank 0 at 127.0.0.1:{port}" in str(answer)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        (answer,) = meet(2, lambda rendezvous: rendezvous.wait_for_ranks(), ranks=[0], seconds=1, port=port)
    assert isinstance(answer, ClusterError)
    assert f"port {port} of {socket.gethostname()} is in use" in str(answer)


def test_everybody_gets_what_everybody_gave() -> None:
    def talk(rendezvous: Rendezvous) -> list[Any]:
        return [rendezvous.gather({"rank": rendezvous.rank}), rendezvous.gather(rendezvous.rank * 1.5)]

    assert meet(4, talk) == [[[{"rank": rank} for rank in range(4)], [0.0, 1.5, 3.0, 4.5]]] * 4


def test_a_second_rendezvous_does_not_find_the_first_one() -> None:
    def talk(rendezvous: Rendezvous) -> list[int]:
        first = rendezvous.gather(1)
        again = Rendezvous("test", launch=rendezvous.launch, timeout=timedelta(seconds=20))
        return [*first, *again.gather(2)]

    assert meet(2, talk) == [[1, 1, 2, 2]] * 2


def test_bad_input_on_one_rank_ends_all_with_its_sentence() -> None:
    def talk(rendezvous: Rendezvous) -> str:
        with rendezvous.raise_on_all_ranks():
            if rendezvous.rank == 2:
                raise ValueError("shard b.tar does not exist")
        return "went on"

    for answer in meet(3, talk):
        assert isinstance(answer, ClusterError)
        assert str(answer) == f"rank 2 ({socket.gethostname()}): shard b.tar does not exist"


def test_bad_input_on_all_ranks_stays_what_it_was() -> None:
    def talk(rendezvous: Rendezvous) -> str:
        with rendezvous.raise_on_all_ranks():
            raise KeyError("never caught") if rendezvous.rank > 9 else FileNotFoundError(2, "No such file", "x.yaml")

    with pytest.raises(FileNotFoundError):
        meet(2, talk)


def test_the_same_facts_pass() -> None:
    assert meet(2, lambda rendezvous: rendezvous.check_agreement({"a": "1"})) == [None, None]


def test_what_differs_is_named_with_its_ranks() -> None:
    def talk(rendezvous: Rendezvous) -> None:
        rendezvous.check_agreement({"freeze.t_0": "0.8" if rendezvous.rank < 2 else "0.9", "run.seed": "0"})

    host = socket.gethostname()
    for answer in meet(3, talk):
        assert isinstance(answer, ClusterError)
        assert f"freeze.t_0 is 0.8 on ranks 0-1 ({host}) but 0.9 on rank 2 ({host})" in str(answer)
        assert "run.seed" not in str(answer)


def test_facts_differ_with_what_matters_and_not_with_the_folder(tmp_path: Path) -> None:
    folders = [write_shards(tmp_path / name, [4, 4]) for name in ("a", "b")]
    shards = [[str(path) for path in sorted(folder.glob("*.tar"))] for folder in folders]
    configs = [
        build_config({"data.train": (str(folder), "here"), "freeze.t_0": (t_0, "here")}, recipe="x")
        for folder, t_0 in zip([*folders, folders[0]], [0.8, 0.8, 0.9], strict=True)
    ]
    facts = [run_facts(configs[i], shards=shards[i], lengths=[4, 4], ds_config={"a": 1}) for i in (0, 1)]
    assert facts[0] == facts[1]
    other = run_facts(configs[2], shards=shards[0], lengths=[4, 4], ds_config={"a": 2})
    assert {name for name in other if other[name] != facts[0][name]} == {"freeze.t_0", "the DeepSpeed configuration"}
    with (folders[1] / "tiny-train-0001.tar").open("ab") as file:
        file.write(bytes(512))
    assert fingerprint_shards(shards[1], [4, 4]) != fingerprint_shards(shards[0], [4, 4])
    assert fingerprint_shards(shards[0], [4, 3]) != fingerprint_shards(shards[0], [4, 4])


def test_versions_tell_builds_and_code_apart() -> None:
    import torch

    versions = software_versions()
    assert versions["torch"] == torch.__version__
    assert len(versions["vitfreeze"]) == 12
    assert all(version != "not installed" for version in versions.values())
    assert json.loads(json.dumps(versions)) == versions
