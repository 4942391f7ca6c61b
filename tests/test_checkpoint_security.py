"""A run folder, weights or data from somebody else cannot run code: a bomb is planted in every file that is read."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_shards import write_shards

from vitfreeze.architecture import MODEL_SIZES
from vitfreeze.checkpoint import folder, load_checkpoint, save_engine
from vitfreeze.config import Config, load_config
from vitfreeze.data import ReadOptions, TrainLoader
from vitfreeze.engine import FreezingEngine
from vitfreeze.engine.settings import read_settings
from vitfreeze.files import read_json_lines
from vitfreeze.model import LocalMIM
from vitfreeze.pretrained import read_pretrained
from vitfreeze.ranks import Ranks
from vitfreeze.training.start import TrainingData, choose_start

ALONE = Ranks.alone(torch.device("cpu"))
DS_CONFIG = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0}


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def pickled(trace: Path) -> bytes:
    return pickle.dumps(Bomb(trace))


def torch_saved(trace: Path) -> bytes:
    data = io.BytesIO()
    torch.save({"model": {"cls_token": Bomb(trace)}}, data)
    return data.getvalue()


def torch_saved_of_old(trace: Path) -> bytes:
    data = io.BytesIO()
    torch.save({"model": Bomb(trace)}, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


def numpy_saved(trace: Path) -> bytes:
    data = io.BytesIO()
    np.savez(data, text=np.array([Bomb(trace)], dtype=object))
    return data.getvalue()


def yaml_tagged(trace: Path) -> bytes:
    return f"model: !!python/object/apply:os.system ['touch {trace}']\n".encode()


BOMBS = [pickled, torch_saved, torch_saved_of_old, numpy_saved, yaml_tagged]


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """The file that a bomb would leave."""
    path = tmp_path / "exploded"
    yield path
    assert not path.exists(), "code from a file was run"


@pytest.fixture(scope="module")
def engine() -> Iterator[FreezingEngine]:
    torch.manual_seed(0)
    model = LocalMIM(**asdict(MODEL_SIZES["vit_tiny_test"]), img_size=32, hog_nbins=9)
    engine = FreezingEngine(model, ds_config=DS_CONFIG, micro_batch=2)
    yield engine
    engine.destroy()


def resume(run_dir: Path, engine: FreezingEngine) -> None:
    """What `vitfreeze pretrain` reads of a run folder."""
    start = choose_start(
        Config(), run_dir, fresh=False, ranks=ALONE, data=TrainingData(names=(), lengths=(), steps_per_epoch=625)
    )
    read_json_lines(run_dir / "metrics.jsonl")
    read_json_lines(run_dir / "events.jsonl")
    if start.checkpoint:
        start.checkpoint.read_config()
        load_checkpoint(start.checkpoint, engine)


def test_the_bombs_are_live(tmp_path: Path) -> None:
    pickle.loads(pickled(tmp_path / "exploded"))
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize(
    "name",
    ["weights.safetensors", "masters.safetensors", "rank-00000.safetensors", "config.yaml", "manifest.json", "newest",
     "run/config.yaml", "run/metrics.jsonl", "run/events.jsonl"],
)  # fmt: skip
def test_a_run_folder_of_somebody_else_runs_no_code(
    engine: FreezingEngine, tmp_path: Path, trace: Path, name: str, bomb: Callable[[Path], bytes]
) -> None:
    run_dir = tmp_path / "run"
    path = save_engine(run_dir, engine, step=1, config=Config(), extra={}, keep=1).path
    assert path is not None
    (run_dir / "config.yaml").write_bytes((path / "config.yaml").read_bytes())
    targets = {"newest": path.parent / "newest", "manifest.json": path / "manifest.json"}
    target = targets.get(name) or (run_dir / name[4:] if name.startswith("run/") else path / name)
    target.write_bytes(bomb(trace))
    if target.parent == path and name != "manifest.json":  # somebody else would have made the checksums fit
        content: dict[str, Any] = folder.read_manifest(path)
        content["files"][name] = {"bytes": target.stat().st_size, "sha256": folder.hash_file(target)}
        folder.write_manifest(path, content)
    if name in ("newest", "run/metrics.jsonl", "run/events.jsonl"):
        resume(run_dir, engine)  # damage there does not even matter
    else:
        with pytest.raises(ValueError, match=target.name.replace(".", r"\.")):
            resume(run_dir, engine)


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_weights_of_somebody_else_run_no_code(
    tmp_path: Path, trace: Path, suffix: str, bomb: Callable[[Path], bytes]
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(bomb(trace))
    with pytest.raises(ValueError, match="weights"):
        read_pretrained(path)


@pytest.mark.parametrize("bomb", BOMBS)
def test_recipes_and_deepspeed_files_run_no_code(tmp_path: Path, trace: Path, bomb: Callable[[Path], bytes]) -> None:
    for name, read in (("recipe.yaml", load_config), ("ds.json", read_settings)):
        (tmp_path / name).write_bytes(bomb(trace))
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read(tmp_path / name)


@pytest.mark.parametrize("bomb", [pickled, torch_saved, numpy_saved])
@pytest.mark.parametrize("suffix", ["pkl", "pyd", "pth", "npz", "cls", "json"])
def test_shards_and_their_stored_index_run_no_code(
    tmp_path: Path, trace: Path, suffix: str, bomb: Callable[[Path], bytes]
) -> None:
    """Readers of WebDataset shards decode members by suffix, and some of those suffixes mean pickle."""
    shards = write_shards(tmp_path / "shards", [6])
    data = bomb(trace)
    with tarfile.open(next(shards.glob("*.tar")), "a") as archive:
        for name in (f"s90000.{suffix}", "s90000.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    info = json.loads((shards / "_info.json").read_text())
    info["splits"]["train"] |= {"num_samples": 7, "shard_lengths": [7]}
    (shards / "_info.json").write_text(json.dumps(info))

    def read() -> None:
        loader = TrainLoader(
            shards, img_size=32, num_patches=16, global_batch=2, micro_batch=2, rank=0, world_size=1, seed=0,
            options=ReadOptions(workers=0, cache_dir=tmp_path / "cache", max_bad_fraction=1.0),
        )  # fmt: skip
        assert len(list(loader.batches(0, 3))) == 3

    read()
    for index in (tmp_path / "cache").rglob("*.npz"):
        index.write_bytes(data)
    read()
