"""Checkpoints on disk: exact, whole at every instant, and found again when the newest is damaged."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitfreeze.architecture import MODEL_SIZES
from vitfreeze.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    SaveReport,
    SaveSchedule,
    find_checkpoint,
    folder,
    load_checkpoint,
    open_checkpoint,
    read_weights,
    save_engine,
)
from vitfreeze.config import Config, Duration, OptimConfig
from vitfreeze.engine import FreezingEngine
from vitfreeze.model import LocalMIM

DS_CONFIG = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0}


def build_engine(frozen_layers: int = 0, seed: int = 0) -> FreezingEngine:
    torch.manual_seed(seed)
    model = LocalMIM(**asdict(MODEL_SIZES["vit_tiny_test"]), img_size=32, hog_nbins=9)
    return FreezingEngine(model, ds_config=DS_CONFIG, micro_batch=2, frozen_layers=frozen_layers)


def train(engine: FreezingEngine, first: int, last: int) -> list[float]:
    """Take steps first..last; a layer freezes every second step."""
    losses = []
    for step in range(first, last):
        engine.freeze(min(4, step // 2), step=step)
        engine.set_learning_rates(dict.fromkeys(engine.unit_names, 1e-2))
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(2, 3, 32, 32, generator=generator)
        output = engine(images, noise=torch.rand(2, 16, generator=generator))
        engine.backward(output.loss)
        engine.step()
        losses.append(float(output.loss.detach()))
    return losses


@pytest.fixture(scope="module")
def engine() -> Iterator[FreezingEngine]:
    """One engine after five steps, with two frozen layers, for tests that only save it."""
    engine = build_engine()
    train(engine, 0, 5)
    yield engine
    engine.destroy()


def save(engine: FreezingEngine, run_dir: Path, step: int, *, keep: int = 2) -> SaveReport:
    return save_engine(run_dir, engine, step=step, config=Config(), extra={"step": step}, keep=keep)


def names_in(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()}


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    engine = build_engine()
    train(engine, 0, 5)
    local = {"sum": torch.tensor(1.5)}
    save_engine(tmp_path, engine, step=5, config=Config(), extra={"a": [1]}, keep=1, local=local)
    expected = train(engine, 5, 9)
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.destroy()

    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.frozen_layers, checkpoint.extra) == (5, 2, {"a": [1]})
    engine = build_engine(checkpoint.frozen_layers, seed=1)  # other weights: all must come from the files
    assert load_checkpoint(checkpoint, engine) == local
    assert train(engine, 5, 9) == expected
    assert all(torch.equal(value, weights[name]) for name, value in engine.module.state_dict().items())
    engine.destroy()


def test_training_goes_on_while_the_writer_writes_what_was(tmp_path: Path) -> None:
    engine = build_engine()
    train(engine, 0, 2)
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    writer = CheckpointWriter(tmp_path, keep=1, ranks=engine.ranks)
    writer.start(2, engine=engine, config=Config(), extra={})
    train(engine, 2, 4)
    report = writer.finish()
    engine.destroy()
    assert report is not None
    assert report.path is not None
    assert 0 < report.stall_seconds < report.seconds
    saved = load_file(report.path / folder.WEIGHTS)
    assert all(torch.equal(saved[name], value) for name, value in weights.items())


def test_weights_are_read_in_full_precision(engine: FreezingEngine, tmp_path: Path) -> None:
    report = save(engine, tmp_path, 5)
    assert report.path is not None
    weights = read_weights(open_checkpoint(report.path))
    expected = engine.module.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_old_checkpoints_leave_after_the_new_one_is_whole(engine: FreezingEngine, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(engine, tmp_path, step, keep=2)
    assert names_in(tmp_path / "checkpoints") == {"newest", "step-00000002", "step-00000003"}
    assert (tmp_path / "checkpoints" / "newest").read_text() == "step-00000003\n"


def test_a_run_that_went_back_goes_on_from_what_it_wrote_last(engine: FreezingEngine, tmp_path: Path) -> None:
    for step in (10, 20, 15, 20):  # back to 10, and again over 20: nothing whole is overwritten
        save(engine, tmp_path, step, keep=4)
    assert {"step-00000020", "step-00000020.2"} < names_in(tmp_path / "checkpoints")
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.path.name, found.serial) == ("step-00000020.2", 4)


@pytest.mark.parametrize("name", ["weights.safetensors", "rank-00000.safetensors", "manifest.json", "config.yaml"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_newest_falls_back_to_the_one_before(
    engine: FreezingEngine, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(engine, tmp_path, 1)
    newest = save(engine, tmp_path, 2).path
    assert newest is not None
    data = (newest / name).read_bytes()
    middle = len(data) // 2
    if damage == "missing":
        (newest / name).unlink()
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        (newest / name).write_bytes(data[:middle] if damage == "truncated" else flipped)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [Path(path).name for path, _ in found.rejected] == ["step-00000002"]
    assert name in caplog.text
    with pytest.raises(CheckpointError, match=name):
        find_checkpoint(newest)


def test_without_its_pointer_the_newest_is_found(engine: FreezingEngine, tmp_path: Path) -> None:
    save(engine, tmp_path, 1)
    save(engine, tmp_path, 2)
    (tmp_path / "checkpoints" / "newest").unlink()
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2


def test_only_damaged_checkpoints_are_an_error_and_none_is_none(engine: FreezingEngine, tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    path = save(engine, tmp_path, 1).path
    assert path is not None
    (path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        find_checkpoint(tmp_path)


def test_half_written_and_half_deleted_folders_are_cleared(engine: FreezingEngine, tmp_path: Path) -> None:
    save(engine, tmp_path, 1)
    parent = tmp_path / "checkpoints"
    for name in (".saving-step-00000002", ".deleting-step-00000000"):
        (parent / name).mkdir()
        (parent / name / "weights.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path) is not None
    save(engine, tmp_path, 2)
    assert names_in(parent) == {"newest", "step-00000001", "step-00000002"}


def test_a_write_that_fails_leaves_the_old_checkpoint_alone(engine: FreezingEngine, tmp_path: Path) -> None:
    save(engine, tmp_path, 1, keep=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints" / "step-00000001").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the system refuses larger files, as a full disk
    try:
        with pytest.raises(CheckpointError, match=r"step 2 could not be saved in .*: rank 0: "):
            save(engine, tmp_path, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path / "checkpoints") == {"newest", "step-00000001"}
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == before
    assert save(engine, tmp_path, 3, keep=1).path is not None


def test_a_manifest_names_no_file_outside(engine: FreezingEngine, tmp_path: Path) -> None:
    path = save(engine, tmp_path, 1).path
    assert path is not None
    content = folder.read_manifest(path)
    content["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    folder.write_manifest(path, content)
    with pytest.raises(CheckpointError, match="outside of its folder"):
        open_checkpoint(path)


def test_slices_that_were_not_saved_are_an_error(engine: FreezingEngine, tmp_path: Path) -> None:
    path = save(engine, tmp_path, 1).path
    assert path is not None
    checkpoint = open_checkpoint(path)
    manifest = json.loads(json.dumps(checkpoint.manifest))
    group = manifest["groups"]["layer_05.decay"]
    group["slices"] = [[name, start, stop - 1] for name, start, stop in group["slices"]]
    other = build_engine(checkpoint.frozen_layers)
    with pytest.raises(CheckpointError, match=r"lacks elements \d+ to \d+ of layer_05.decay"):
        load_checkpoint(replace(checkpoint, manifest=manifest), other)
    other.destroy()


def test_the_configuration_comes_back(engine: FreezingEngine, tmp_path: Path) -> None:
    config = replace(Config(), optim=OptimConfig(blr=3e-4))
    save_engine(tmp_path, engine, step=1, config=config, extra={}, keep=1)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.read_config() == config


def test_saving_is_due_at_multiples_also_when_one_was_missed() -> None:
    saves = SaveSchedule(Duration(5, "steps"), start_step=3, steps_per_epoch=10, total_steps=100)
    assert [step for step in range(3, 12) if saves.is_due(step)] == [5, 6, 7, 8, 9, 10, 11]
    saves.note_start(6)
    assert [step for step in range(6, 12) if saves.is_due(step)] == [10, 11]


def test_a_failed_save_is_tried_again() -> None:
    saves = SaveSchedule(Duration(5, "steps"), start_step=0, steps_per_epoch=10, total_steps=100, retry_seconds=0.0)
    saves.note_start(5)
    assert not saves.is_due(6)
    saves.note_end(SaveReport(step=5, path=None, seconds=0, stall_seconds=0, bytes=0, error="no room"))
    assert saves.is_due(6)
    assert saves.last_saved == 0


def test_saving_by_minutes_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("vitfreeze.checkpoint.saving.time.monotonic", lambda: now[0])
    saves = SaveSchedule(Duration(2, "minutes"), start_step=0, steps_per_epoch=10, total_steps=100)
    assert not saves.is_due(50)
    now[0] += 121
    assert saves.is_due(51)


def test_nothing_is_left_open(engine: FreezingEngine, tmp_path: Path) -> None:
    save(engine, tmp_path, 1)
    before = len(os.listdir("/proc/self/fd"))
    for step in (2, 3, 4):
        save(engine, tmp_path, step)
        assert find_checkpoint(tmp_path) is not None
    assert len(os.listdir("/proc/self/fd")) == before
