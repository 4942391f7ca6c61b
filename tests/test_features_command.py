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
from tiny_shards import jpeg_of, write_shards, write_tar

from vitfreeze import cli
from vitfreeze.evaluate import write_features
from vitfreeze.evaluate.image_files import find_image_files
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


def test_images_that_cannot_be_read_have_no_row(
    weights: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_features(str(weights), [str(photos)], out=tmp_path / "whole.npz")
    for name in ("0/01.jpg", "0/1.png", "1/01.webp", "1/5.jpg"):
        (photos / name).write_bytes(b"no image")
    (photos / "0" / "._0.jpg").write_bytes(b"hidden")
    assert call("features", str(weights), str(photos), "-o", str(tmp_path / "rest.npz")) == 0
    (told,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith(f"4 of 9 images cannot be read: {photos}/0/01.jpg: not a readable image")
    assert "01.webp" in told
    assert "5.jpg" not in told  # three are named
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "rest.npz") as rest:
        assert rest["keys"].tolist() == whole["keys"].tolist()
        np.testing.assert_allclose(rest["8.mean"], whole["8.mean"], atol=1e-5)
        assert len(rest["labels"]) == 5


def test_no_image_that_can_be_read_is_one_sentence(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"")
    out = tmp_path / "f.npz"
    assert call("features", str(weights), str(tmp_path / "1.jpg"), str(tmp_path / "2.jpg"), "-o", str(out)) == 2
    words = "there is no image to take features of: none of the 2 can be read ("
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_links_in_a_circle_are_told_and_not_followed(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "beside.jpg").write_bytes(jpeg_of((1, 2, 3)))
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "6.jpg").write_bytes(jpeg_of((1, 2, 3)))
    files = find_image_files([str(photos)])
    for name, target in (("a", photos), ("0/a", photos), ("0/b", tmp_path), ("1/a", photos / "1"), ("2", "../far")):
        (photos / name).symlink_to(target)
    assert find_image_files([str(photos)]) == sorted([*files, photos / "2" / "6.jpg"])
    assert "4 folders are left out: " in caplog.text


def test_samples_of_shards_that_cannot_be_read_have_no_row(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_shards(tmp_path / "shards", [3, 3], size=(70, 64))
    members = [("bad.jpg", b"?"), ("good.jpg", jpeg_of((1, 2, 3))), ("worse.jpg", b"?")]
    (folder / "_info.json").unlink()
    write_tar(folder / "tiny-train-0002.tar", members)
    write_features(str(weights), [str(folder)], out=tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as arrays:
        assert arrays["keys"].tolist() == [*(f"s{number:05d}" for number in range(6)), "good"]
        assert arrays["8.mean"].shape == (7, 48)
    assert "2 samples were unusable" in caplog.text


def _write(weights: str, photos: str, out: str) -> None:
    write_features(weights, [photos], out=Path(out))


@pytest.mark.distributed
def test_ranks_share_the_images(weights: Path, photos: Path, tmp_path: Path) -> None:
    run_ranks(_write, str(weights), str(photos), str(tmp_path / "two.npz"))
    write_features(str(weights), [str(photos)], out=tmp_path / "one.npz")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        np.testing.assert_array_equal(one["keys"], two["keys"])
        np.testing.assert_allclose(one["8.mean"], two["8.mean"], atol=1e-5)


@pytest.mark.distributed
def test_a_rank_may_have_no_image_that_can_be_read(weights: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("0/2.jpg", "1/1.jpg", "1/3.jpg", "0/4.jpg"):  # all but the first
        (photos / name).write_bytes(b"no image")
    run_ranks(_write, str(weights), str(photos), str(tmp_path / "two.npz"))
    with np.load(tmp_path / "two.npz") as two:
        assert two["keys"].tolist() == [str(photos / "0" / "0.jpg")]
        assert two["8.mean"].shape == (1, 48)


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
