"""Features as a file, and the page on the encoder as a backbone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_ranks
from safetensors import safe_open
from tiny_shards import jpeg_of

from vitfreeze import cli
from vitfreeze.evaluate import write_features
from vitfreeze.export import export_run
from vitfreeze.model import LocalMIM, to_timm

ROOT = Path(__file__).resolve().parents[1]
SIZE = {"patch_size": 8, "embed_dim": 48, "depth": 8, "num_heads": 3, "mlp_ratio": 4.0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = LocalMIM(**SIZE, img_size=64, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_file(to_timm(model.state_dict()), path, metadata={"model_size": json.dumps(size_of(SIZE))})
    return path


def size_of(size: dict[str, Any]) -> dict[str, Any]:
    return {**size, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(5):
        path = tmp_path / "photos" / f"{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_of((50 * number, 100, 200), size=(70, 64)))
    return tmp_path / "photos"


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def test_features_of_a_folder(weights: Path, photos: Path, tmp_path: Path) -> None:
    options = ["--blocks", "2", "8", "--what", "token", "mean", "grid"]
    for suffix in ("npz", "safetensors"):
        assert call("features", str(weights), str(photos), "-o", str(tmp_path / f"f.{suffix}"), *options) == 0
    with np.load(tmp_path / "f.npz") as arrays, safe_open(tmp_path / "f.safetensors", framework="np") as file:
        assert [Path(key).name for key in arrays["keys"]] == ["0.jpg", "2.jpg", "4.jpg", "1.jpg", "3.jpg"]
        assert json.loads(file.metadata()["keys"]) == arrays["keys"].tolist()
        shapes = {name: arrays[name].shape for name in arrays if "." in name}
        assert shapes == {
            **{f"{block}.token": (5, 48) for block in (2, 8)},
            **{f"{block}.mean": (5, 48) for block in (2, 8)},
            **{f"{block}.grid": (5, 8, 8, 48) for block in (2, 8)},
        }
        assert all(np.array_equal(file.get_tensor(name), arrays[name]) for name in shapes)
        np.testing.assert_allclose(arrays["8.grid"].mean(axis=(1, 2)), arrays["8.mean"], atol=1e-5)
        assert set(arrays["labels"].tolist()) == {-1}


def test_features_of_shards_are_those_of_knn(weights: Path, demo_shards: Path, tmp_path: Path) -> None:
    from vitfreeze.config import load_config
    from vitfreeze.data import open_split
    from vitfreeze.evaluate import extract_features
    from vitfreeze.pretrained import build_encoder, read_pretrained

    write_features(str(weights), [str(demo_shards)], out=tmp_path / "f.npz", kinds=("mean",))
    given = [f"data.train={demo_shards}", "model.size=vit_tiny_test", "model.img_size=64", "data.workers=0"]
    found = extract_features(build_encoder(read_pretrained(weights)), open_split(load_config("paper", given), "train"))
    with np.load(tmp_path / "f.npz") as arrays:
        np.testing.assert_allclose(arrays["8.mean"], found.features.numpy(), atol=1e-5)
        np.testing.assert_array_equal(arrays["labels"], found.labels.numpy())


def _write(weights: str, photos: str, out: str) -> None:
    write_features(weights, [photos], out=Path(out))


@pytest.mark.distributed
def test_ranks_share_the_images(weights: Path, photos: Path, tmp_path: Path) -> None:
    run_ranks(_write, str(weights), str(photos), str(tmp_path / "two.npz"))
    write_features(str(weights), [str(photos)], out=tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        np.testing.assert_array_equal(one["keys"], two["keys"])
        np.testing.assert_allclose(one["8.mean"], two["8.mean"], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "f.txt"], "expected a name that ends in .npz or .safetensors"),
        (["-o", "f.npz", "--what", "all"], "expected some of token, mean, grid"),
        (["-o", "nowhere/f.npz"], "there is no folder"),
        (["-o", "f.npz", "--blocks", "9"], "expected numbers from 1 to depth 8"),
    ],
)
def test_bad_input_is_one_sentence(
    options: list[str], words: str, weights: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("features", str(weights), str(photos), *options) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_the_page_on_backbones_runs(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_run(str(weights), to="safetensors", out=str(tmp_path / "encoder.safetensors"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "backbone.md").read_text(), flags=re.DOTALL):
        exec(code, names)
    images = torch.randn(2, 3, 96, 160)
    maps = names["encoder"].forward_intermediates(images, indices=[1, 3, 5, 7], intermediates_only=True)
    assert [tuple(map_BDHW.shape) for map_BDHW in maps] == [(2, 48, 12, 20)] * 4
    pyramid = names["SimplePyramid"](48, width=16)(maps[-1])
    assert [tuple(level.shape[1:]) for level in pyramid] == [(16, 48, 80), (16, 24, 40), (16, 12, 20), (16, 6, 10)]
