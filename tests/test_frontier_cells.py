"""The study of what freezing buys, run in its smallest size: real commands, a kill, and a start that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.frontier.running import wait_for

ROOT = Path(__file__).resolve().parents[1]


def command(demo_shards: Path, out: Path) -> list[str]:
    study = ["--data", str(demo_shards), "--out", str(out), "--size", "minutes", "--seeds", "0", "--arms", "paper"]
    return [sys.executable, "-m", "benchmarks.frontier", *study]


def environment() -> dict[str, str]:
    # A test of this process that made an engine has left it the variables, and the open port, of a launch of one rank.
    launch = {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"}
    inherited = {name: value for name, value in os.environ.items() if name not in launch}
    return {**inherited, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def kill_when(path: Path, process: subprocess.Popen[str]) -> None:
    """Kill the study and the command that it runs as soon as a file is there."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the study ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_request_to_stop_is_passed_on_and_waited_for() -> None:
    saves = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", f"import signal, sys, time; {saves}"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert wait_for(process) == (75, True)
    assert signal.getsignal(signal.SIGTERM) == before
    timer.join()
    process.stdout.close()


@pytest.mark.distributed
def test_a_study_is_killed_and_goes_on(demo_shards: Path, tmp_path: Path) -> None:
    begun = subprocess.Popen(
        command(demo_shards, tmp_path), cwd=ROOT, env=environment(), start_new_session=True, text=True
    )
    run = tmp_path / "runs" / "paper_budget1_blr0.008_seed0"
    kill_when(run / "finetune.attempts", begun)
    pretrained = (run / "pretrain.json").read_text()
    done = subprocess.run(command(demo_shards, tmp_path), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (run / "pretrain.json").read_text() == pretrained  # it was not trained again
    (path,) = (tmp_path / "cells").glob("*.json")
    check_record(json.loads(path.read_text()))
    before = path.stat().st_mtime_ns
    again = subprocess.run(command(demo_shards, tmp_path), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0
    assert path.stat().st_mtime_ns == before


def check_record(record: dict[str, Any]) -> None:
    assert (record["arm"], record["seed"], record["judged_on"], record["labels"]) == ("paper", 0, "held_out", 45)
    assert record["images"] == {"train": 90, "held_out": 10, "test": 25, "classes": 12}
    assert set(record["accuracy"]) == {"finetuned", "linear", "knn_10"}
    assert all(0 <= accuracy <= 1 for accuracy in record["accuracy"].values())
    assert 0.9 < record["cost"]["pretraining"] <= 1
    assert record["cost"]["with_finetuning"] < 1
    steps, curve = record["pretraining"]["steps"], record["pretraining"]["curve"]
    assert steps > 20  # freezing buys more steps than the plain run's 20
    assert curve["step"][-1] == steps
    assert curve["frozen_layers"][-1] > 0
    assert record["finetuning"]["steps"] == 12
    assert record["seconds"]["pretraining"] > 0
    assert record["seconds"]["pretraining_cpu"] > 0
    assert record["seconds"]["finetuning_cpu"] is None  # cut short by the kill
    assert {"vitfreeze", "torch", "deepspeed", "python"} <= record["versions"].keys()
    assert "pretraining" in record
    assert record["pretraining"]["recipe"] == "paper"
    assert "/" not in json.dumps({**record, "versions": {}, "device": ""})
