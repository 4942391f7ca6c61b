"""Weights & Biases beside TensorBoard: a real run in its offline mode, whose file is read back."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import run_command
from test_pretrain import SMALL

from vitfreeze.boards import check_boards
from vitfreeze.config import ConfigError, load_config

BLOCK, HEADER = 32 << 10, struct.Struct("<IHB")  # of a log as LevelDB writes it; the whole file has 7 bytes of its own


def read_records(path: Path) -> Iterator[Any]:
    """Yield what a .wandb file holds."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place < len(data):
        if BLOCK - place % BLOCK < HEADER.size:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        whole += data[place + HEADER.size : place + HEADER.size + length]
        place += HEADER.size + length
        if kind in (1, 4):  # full, or the last part
            yield Record.FromString(whole)
            whole = b""


def train(run_dir: Path, shards: Path, *overrides: str, status: int = 0, **variables: str) -> str:
    settings = [
        f"data.train={shards}", "data.val=[]", *SMALL, "freeze.mode=off", "run.length=12 steps",
        "run.log_every_steps=2", "run.show_every=6 steps", f"run.dir={run_dir}", "run.wandb=somebody/vits",
    ]  # fmt: skip
    done = run_command("pretrain", "demo", *settings, *overrides, **({"WANDB_MODE": "offline"} | variables))
    assert done.returncode == status, done.stderr
    return done.stderr


def test_a_run_and_its_resume_are_one_run_of_weights_and_biases(demo_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'vitfreeze[wandb]'")
    run_dir = tmp_path / "run"
    said = train(run_dir, demo_shards, "checkpoint.every=4 steps")
    assert f"Weights & Biases: offline, in {run_dir / 'wandb'}" in said
    for newest in (run_dir / "checkpoints").glob("*12"):  # as if the run had been killed before its last save
        shutil.rmtree(newest)
    train(run_dir, demo_shards, "checkpoint.every=4 steps")
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    first, second = ([*read_records(path)] for path in files)
    runs = [next(record.run for record in records if record.HasField("run")) for records in (first, second)]
    assert {run.run_id for run in runs} == {(run_dir / "wandb" / "run_id.txt").read_text()}
    assert {(run.entity, run.project, run.display_name) for run in runs} == {("somebody", "vits", "run")}
    sent = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert sent["run.length"] == "12 steps"
    logged = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in first if record.HasField("history")
    ]  # fmt: skip
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in logged if "loss" in line}
    assert losses == {line["step"]: line["loss"] for line in metrics}
    assert [line["step"] for line in logged if any("reconstruction" in key for key in line)] == [6, 12]
    again = [record for record in second if record.HasField("history")]
    assert again, "the steps that are taken again are shown again"
    assert [record.exit.exit_code for record in first if record.HasField("exit")] == [0]


def test_without_wandb_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("demo", ["run.wandb=vits"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run\.wandb .*pip install 'vitfreeze\[wandb\]'.*command line"):
        check_boards(config)
    check_boards(load_config("demo", []))


def test_a_project_that_lets_nobody_in_is_said_before_training(demo_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'vitfreeze[wandb]'")
    said = train(tmp_path / "run", demo_shards, status=2, WANDB_MODE="online", WANDB_API_KEY="", HOME=str(tmp_path))
    assert "run.wandb is 'somebody/vits'; allowed: a project that Weights & Biases opens; wandb says: " in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
