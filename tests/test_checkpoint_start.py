"""Where a run begins: every case at start-up, in the order in which they are decided."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from vitfreeze.architecture import MODEL_SIZES
from vitfreeze.checkpoint import CheckpointError, save_engine
from vitfreeze.config import Config, ConfigError, FreezeConfig, ResumeConfig, RunConfig
from vitfreeze.engine import FreezingEngine
from vitfreeze.model import LocalMIM
from vitfreeze.ranks import Ranks
from vitfreeze.training.start import RunFolder, Start, TrainingData, choose_start
from vitfreeze.training.state import read_adaptive_checks

DATA = TrainingData(names=(), lengths=(), steps_per_epoch=625)
ALONE = Ranks.alone(torch.device("cpu"))


@pytest.fixture(scope="module")
def engine() -> Iterator[FreezingEngine]:
    torch.manual_seed(0)
    model = LocalMIM(**asdict(MODEL_SIZES["vit_tiny_test"]), img_size=32, hog_nbins=9)
    ds_config = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0}
    engine = FreezingEngine(model, ds_config=ds_config, micro_batch=2)
    yield engine
    engine.destroy()


def start(config: Config, directory: Path, *, fresh: bool = False) -> Start:
    with RunFolder(directory, ranks=ALONE):
        return choose_start(config, directory, fresh=fresh, ranks=ALONE, data=DATA)


def save(engine: FreezingEngine, directory: Path, step: int, *, config: Config | None = None, **extra: str) -> Path:
    report = save_engine(directory, engine, step=step, config=config or Config(), extra=extra, keep=3)
    assert report.path is not None
    return report.path


def test_an_empty_folder_begins_a_run(tmp_path: Path) -> None:
    begun = start(Config(), tmp_path / "run", fresh=True)
    assert (begun.checkpoint, begun.step) == (None, 0)
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear reader")
    with pytest.raises(ConfigError, match=r"run\.dir .* holds thesis\.tex"):
        start(Config(), tmp_path)
    assert not (tmp_path / "config.yaml").exists()


def test_a_log_of_the_scheduler_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "slurm-1.out").write_text("")
    assert start(Config(), tmp_path).checkpoint is None


def test_a_run_that_never_saved_begins_again(tmp_path: Path) -> None:
    start(Config(), tmp_path)
    assert start(Config(), tmp_path).step == 0


def test_fresh_refuses_a_run_and_says_how(engine: FreezingEngine, tmp_path: Path) -> None:
    start(Config(), tmp_path)
    path = save(engine, tmp_path, 4)

    def files() -> list[tuple[Path, int]]:  # the lock says who held the folder last
        return sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.name != ".lock")

    before = files()
    with pytest.raises(ConfigError, match=r"--fresh .*\(mv "):
        start(Config(), tmp_path, fresh=True)
    assert files() == before
    assert path.is_dir()


def test_other_settings_are_refused_and_nothing_is_overwritten(engine: FreezingEngine, tmp_path: Path) -> None:
    start(Config(), tmp_path)
    save(engine, tmp_path, 4)
    before = (tmp_path / "config.yaml").read_bytes()
    other = replace(Config(), freeze=FreezeConfig(t_0=0.5))
    with pytest.raises(ConfigError, match=r"freeze\.t_0: 0\.8 there, 0\.5 now"):
        start(other, tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_settings_that_may_change_may_change(engine: FreezingEngine, tmp_path: Path) -> None:
    start(Config(), tmp_path)
    save(engine, tmp_path, 4)
    assert start(replace(Config(), run=RunConfig(log_every_steps=7)), tmp_path).step == 4


def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_one_set_aside(
    engine: FreezingEngine, tmp_path: Path
) -> None:
    start(Config(), tmp_path)
    save(engine, tmp_path, 4)
    (save(engine, tmp_path, 8) / "weights.safetensors").write_bytes(b"damaged")
    begun = start(Config(), tmp_path)
    assert begun.checkpoint is not None
    assert begun.step == 4
    assert "weights.safetensors is damaged" in begun.checkpoint.rejected[0][1]
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*step*")) == [
        ".damaged-step-00000008",
        "step-00000004",
    ]


def test_a_run_with_only_damaged_checkpoints_does_not_silently_begin_anew(
    engine: FreezingEngine, tmp_path: Path
) -> None:
    start(Config(), tmp_path)
    (save(engine, tmp_path, 4) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint"):
        start(Config(), tmp_path)


def test_resume_from_another_run_counts_once(engine: FreezingEngine, tmp_path: Path) -> None:
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    wanted = save(engine, theirs, 4)
    config = replace(Config(), resume=ResumeConfig(from_=str(wanted)))
    begun = start(config, mine)
    assert begun.checkpoint is not None
    assert (begun.checkpoint.path, begun.memory.resumed_from) == (wanted, str(wanted))
    save(engine, mine, 6, config=config, resumed_from=begun.memory.resumed_from)
    again = start(config, mine)  # the same command, after a requeue
    assert again.step == 6
    assert again.memory.resumed_from == str(wanted)


def test_resume_from_goes_back_in_the_same_run(engine: FreezingEngine, tmp_path: Path) -> None:
    start(Config(), tmp_path)
    earlier = save(engine, tmp_path, 4)
    save(engine, tmp_path, 8)
    assert start(replace(Config(), resume=ResumeConfig(from_=str(earlier))), tmp_path).step == 4


def test_resume_from_nothing_or_another_run_is_refused(engine: FreezingEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume\.from"):
        start(replace(Config(), resume=ResumeConfig(from_=str(tmp_path / "none"))), tmp_path / "a")
    other = save(engine, tmp_path / "other", 4, config=replace(Config(), freeze=FreezeConfig(t_0=0.5)))
    with pytest.raises(ConfigError, match=r"freeze\.t_0"):
        start(replace(Config(), resume=ResumeConfig(from_=str(other))), tmp_path / "b")


def test_a_second_job_in_the_folder_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path, ranks=ALONE):
        child = os.fork()  # a POSIX lock is held against other processes only
        if child == 0:
            try:
                RunFolder(tmp_path, ranks=ALONE).__enter__()
            except ConfigError as error:
                owner = f"rank 0 is process {os.getppid()} on {socket.gethostname()}"
                os._exit(7 if "another job trains" in str(error) and owner in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with RunFolder(tmp_path, ranks=ALONE):
        pass


def test_adaptive_checks_come_from_the_checkpoint_not_from_the_log(engine: FreezingEngine, tmp_path: Path) -> None:
    """The log may tell of decisions after the checkpoint, which the run has yet to make."""
    start(Config(), tmp_path)
    check = {"event": "adaptive_check", "step": 3, "changes": None, "frozen_layers": 1}
    save_engine(tmp_path, engine, step=4, config=Config(), extra={"adaptive_checks": [check]}, keep=1)
    later = {**check, "step": 6, "frozen_layers": 2}
    (tmp_path / "events.jsonl").write_text(json.dumps(check) + "\n" + json.dumps(later) + "\n")
    assert read_adaptive_checks(start(Config(), tmp_path).checkpoint) == (check,)


def test_lost_checkpoints_are_no_reason_to_cut_the_logs(engine: FreezingEngine, tmp_path: Path) -> None:
    start(Config(), tmp_path)
    save(engine, tmp_path, 4)
    logs = {"metrics.jsonl": '{"step": 4}\n', "events.jsonl": '{"event": "save", "step": 4}\n'}
    for name, text in logs.items():
        (tmp_path / name).write_text(text)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=r"logs of a run that saved step 4, and no checkpoint any more"):
        start(Config(), tmp_path)
    (tmp_path / "events.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"logs of a run that took steps"):
        start(Config(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == logs["metrics.jsonl"]
    (tmp_path / "events.jsonl").write_text('{"event": "start", "step": 0}\n')  # it never saved
    assert start(Config(), tmp_path).step == 0
