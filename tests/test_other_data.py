"""A run knows its data: what tells shards from others, and what becomes of a run whose shards changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from jobs import Bench, Kill, newest_checkpoint, read_events, read_losses
from tiny_shards import write_shards

from vitfreeze.checkpoint.folder import open_checkpoint
from vitfreeze.data import ShardError, ShardIdentity, describe_difference, identify_shards

LENGTHS = [5, 3]
IN_EPOCHS = ("run.length=2 epochs", "optim.warmup=0.1 epochs", "checkpoint.every=0.5 epochs")


def identify(folder: Path, lengths: list[int] = LENGTHS) -> list[ShardIdentity]:
    return identify_shards([str(path) for path in sorted(folder.glob("*.tar"))], lengths)


def swap(folder: Path) -> None:
    """Let two shards change their names."""
    left, right = sorted(folder.glob("*.tar"))
    left.rename(folder / "other")
    right.rename(left)
    (folder / "other").rename(right)


def test_moved_data_are_the_same(tmp_path: Path) -> None:
    before = identify(write_shards(tmp_path / "a", LENGTHS))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert describe_difference(before, identify(tmp_path / "b")) == ""


def test_what_differs_is_said(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", LENGTHS)
    before = identify(folder)
    assert "tiny-train-0000.tar with 5 samples before, 4 now" in describe_difference(before, identify(folder, [4, 3]))
    assert describe_difference(before, before[::-1]) == "the same 2 shards in another order"
    fewer = describe_difference(before, before[:1])
    assert fewer == "2 shards of 8 samples before, 1 shards of 5 samples now; gone: tiny-train-0001.tar"
    path = sorted(folder.glob("*.tar"))[1]
    data = path.read_bytes()
    for place in (0, len(data) // 3, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert describe_difference(before, identify(folder)) == (
            "1 of 2 shards differ: tiny-train-0001.tar with other content"
        )
    path.write_bytes(data + bytes(512))
    assert "tiny-train-0001.tar with" in describe_difference(before, identify(folder))
    swap(folder)
    assert describe_difference(before, identify(folder)).startswith("2 of 2 shards differ")


def test_remote_shards_are_told_by_name_and_length_and_hold_no_secret() -> None:
    far = identify_shards(["https://user:secret@host/a/x-0.tar?token=secret"], [7])
    assert far == [ShardIdentity("x-0.tar", 7, -1, "")]
    assert describe_difference(far, [ShardIdentity("x-0.tar", 7, 4096, "ab")]) == ""  # it was fetched since


def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"shard .*none\.tar cannot be read"):
        identify_shards([str(tmp_path / "none.tar")], [1])


@pytest.mark.distributed
def test_other_data_are_refused_or_leave_every_rate_and_freeze_at_its_step(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.run("undisturbed", *IN_EPOCHS) == [0], bench.log("undisturbed")
    job = bench.start("changed", *IN_EPOCHS, kill=Kill(where="update", step=12))
    job.processes[0].join(120)
    run, shards = tmp_path / "changed", tmp_path / "shards"
    memory = open_checkpoint(newest_checkpoint(run)).extra
    assert (memory["steps_per_epoch"], [shard[1] for shard in memory["shards"]]) == (10, [40, 40])

    swap(shards)
    assert bench.run("changed", *IN_EPOCHS) == [2]
    assert "resume.other_data=keep_steps" in bench.log("changed")
    assert "2 of 2 shards differ: tiny-train-0000.tar with" in bench.log("changed")

    shutil.rmtree(shards)
    write_shards(shards, [40, 20])  # an epoch of 7 steps, in which the run would end at step 14
    before = (run / "metrics.jsonl").read_bytes()
    assert bench.run("changed", *IN_EPOCHS) == [2]
    assert "tiny-train-0001.tar with 40 samples before, 20 now" in bench.log("changed")
    assert (run / "metrics.jsonl").read_bytes() == before
    allowed = (*IN_EPOCHS, "resume.other_data=keep_steps")
    job = bench.start("changed", *allowed, kill=Kill(where="update", step=17))
    job.processes[0].join(120)
    assert bench.run("changed", *IN_EPOCHS) == [0], bench.log("changed")  # by now these are the run's data

    mine, theirs = read_losses(run), read_losses(tmp_path / "undisturbed")
    assert list(mine) == list(theirs) == list(range(1, 21))
    for name in ("lr", "frozen_layers", "epoch"):
        assert [figures[name] for figures in mine.values()] == [figures[name] for figures in theirs.values()]
    assert mine[20]["frozen_layers"] > mine[11]["frozen_layers"] > 0
    assert mine[15]["loss"] != theirs[15]["loss"]
    assert [event["step"] for event in read_events(run, "other_data")] == [10]
