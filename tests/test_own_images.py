"""Images that are not ImageNet: without labels, by others' tools, in other colours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_shards import jpeg_of, write_tar

from data_prep.__main__ import main as prepare
from vitfreeze import cli
from vitfreeze.config import Colours, load_config
from vitfreeze.data import ShardError, build_train_loader, normalize
from vitfreeze.pretrained import read_pretrained

SMALL = [
    "model.size=vit_tiny_test", "model.img_size=64", "data.workers=0", "data.val=[]", "batch.global_size=8",
    "optim.warmup=1 steps", "run.length=12 steps", "run.show_every=0", "checkpoint.every=12 steps",
]  # fmt: skip


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def mean_of(folder: Path) -> np.ndarray:
    images = [np.asarray(Image.open(path), dtype=np.float64) / 255 for path in folder.iterdir()]
    return np.mean([image.mean(axis=(0, 1)) for image in images], axis=0)


def test_a_flat_folder_in_two_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, shards, run = tmp_path / "photos", tmp_path / "shards", tmp_path / "run"
    photos.mkdir()
    for number in range(24):
        (photos / f"{number}.jpg").write_bytes(jpeg_of((10 * number, 100, 200)))
    assert prepare(["folder", str(photos), "--out", str(shards), "--workers", "1"]) == 0
    capsys.readouterr()
    assert prepare(["describe", str(shards), "--workers", "1"]) == 0
    colours = re.findall(r"'(data\.(?:mean|std)=[^']+)'", capsys.readouterr().out)
    assert len(colours) == 2
    colours[1] = "data.std=[0.3,0.1,0.1]"  # two channels of these images do not vary at all
    assert call("plan", "paper", f"data.train={shards}", *SMALL) == 0
    assert "3 an epoch of 24" in capsys.readouterr().out
    assert call("pretrain", "paper", f"data.train={shards}", f"run.dir={run}", *SMALL, *colours) == 0
    config = load_config(run / "config.yaml")
    assert config.data.mean == pytest.approx(tuple(mean_of(photos)), abs=1e-4)
    assert read_pretrained(run).colours == config.data.colours
    with safe_open(run / "encoder.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["colours"]) == [list(config.data.mean), [0.3, 0.1, 0.1]]
    assert read_pretrained(run / "encoder.safetensors").colours == config.data.colours


def test_labels_are_asked_for_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_tar(tmp_path / "00000.tar", [("a.jpg", jpeg_of((1, 2, 3)))])
    assert call("finetune", "finetune_b_100ep", f"data.train={shard}", f"data.val={shard}", "batch.global_size=1") == 2
    assert "it has no label" in capsys.readouterr().err.splitlines()[-1]


def test_shards_of_img2dataset_are_read_as_they_are(tmp_path: Path) -> None:
    """Captions and facts beside the images, no class, no manifest, other files in the folder."""
    for shard in range(2):
        members = []
        for number in range(8):
            key = f"{shard:05d}{number:04d}"
            members += [(f"{key}.jpg", jpeg_of((number, 0, 0))), (f"{key}.txt", b"a photo"), (f"{key}.json", b"{}")]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    loader = build_train_loader(load_config("paper", [f"data.train={tmp_path}", *SMALL]))
    assert loader.num_samples == 16
    assert loader.steps_per_epoch == 2


def test_a_dot_in_a_name_ends_the_key_and_is_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.v1.jpg", jpeg_of((1, 2, 3)))])
    loader = build_train_loader(load_config("paper", [f"data.train={tmp_path}", *SMALL, "batch.global_size=1"]))
    with pytest.raises(ShardError, match=r"a\.v1\.jpg has a dot before the extension, where WebDataset ends a key"):
        next(loader.batches(0, 1))


def test_normalizing_by_other_colours() -> None:
    images = torch.full((1, 3, 2, 2), 51, dtype=torch.uint8)
    found = normalize(images, colours=Colours((0.1, 0.2, 0.3), (0.5, 0.5, 0.1)))
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.2, 0.0, -1.0]))


def test_colours_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", "paper", "data.std=[0.1, 0.2]") == 2
    assert "three numbers" in capsys.readouterr().err
    assert call("config", "paper", "data.std=[0, 1, 1]") == 2
    assert "three numbers in (0, 1]" in capsys.readouterr().err
