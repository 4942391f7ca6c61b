"""Class-per-folder trees, and the demo set."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import packing
from data_prep.__main__ import main
from data_prep.drawing import CLASSES, draw_image_set
from data_prep.folders import find_images, read_folder

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def jpeg(value: int = 128, size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def read(shards: Path, split: str) -> dict[str, dict[str, bytes]]:
    import webdataset

    paths = sorted(str(path) for path in shards.glob(f"*-{split}-*.tar"))
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(paths, shardshuffle=False)}


def pack(tree: Path, out: Path, *options: str) -> Path:
    assert main(["folder", str(tree), "--out", str(out), "--workers", "1", *options]) == 0
    return out


@pytest.fixture(scope="module")
def cifar(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first five images of each class and split of CIFAR-10."""
    root = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared_dir / "images" / "cifar10_jpeg.tar.gz") as archive:
        for info in archive:
            if info.isfile() and info.name.rsplit("/", 1)[1] < "0005":
                file = archive.extractfile(info)
                assert file is not None
                write(root / info.name, file.read())
    return root / "cifar10"


def test_cifar(cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = pack(cifar, tmp_path / "out", "--samples-per-shard", "16")
    said = capsys.readouterr().out
    assert f"train: 50 images of 10 classes in {cifar / 'train'}" in said
    assert f"validation: 50 images of 10 classes in {cifar / 'test'}" in said
    for split, folder in (("train", "train"), ("validation", "test")):
        samples = read(out, split)
        assert len(samples) == 50
        for label, name in enumerate(CIFAR_CLASSES):
            for number in range(5):
                sample = samples[f"{name}_{number:04d}"]
                assert int(sample["cls"]) == label
                assert sample["jpg"] == (cifar / folder / name / f"{number:04d}.jpg").read_bytes()
    assert sorted(path.name for path in out.glob("*.tar"))[0] == "cifar10-train-0000.tar"


def test_odd_names_and_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "photos"
    write(tree / "cat" / "a.b.jpg", jpeg(1))
    write(tree / "cat" / "a_b.jpg", jpeg(2))
    write(tree / "cat" / "deep" / "er" / "ä ö.JPG", jpeg(3))
    write(tree / "cat" / ("long" * 50 + ".jpg"), jpeg(4))
    write(tree / "cat" / "cat_7.jpeg", jpeg(5))
    write(tree / "dog" / "x.jpg", jpeg(6))
    write(tree / "dog" / "x.png", jpeg(7))
    write(tree / "dog" / "half.jpg", jpeg(size=(200, 200))[:-400])
    write(tree / "dog" / "empty.jpg", b"")
    write(tree / "dog" / "._x.jpg", b"what macOS leaves behind")
    write(tree / "dog" / "notes.txt", b"text")
    (tree / "dog" / "round").symlink_to(tree / "dog")
    out = pack(tree, tmp_path / "out")
    said = capsys.readouterr().out
    samples = read(out, "train")
    assert len(samples) == 7
    assert {"cat_a_b", "cat_a_b-2", "cat_7", "dog_x", "dog_x-2"} < samples.keys()
    assert all("." not in key and len(key) <= 80 for key in samples)
    by_file = {json.loads(sample["json"])["filename"]: sample for sample in samples.values()}
    assert by_file["cat/deep/er/ä ö.JPG"]["jpg"] == jpeg(3)
    assert by_file["dog/x.png"]["jpg"] == jpeg(7)
    assert {name: int(sample["cls"]) for name, sample in by_file.items() if name.startswith("dog")} == {
        "dog/x.jpg": 1,
        "dog/x.png": 1,
    }
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {line["filename"] for line in skipped} == {"dog/half.jpg", "dog/empty.jpg"}
    assert all(line["reason"] and line["split"] == "train" for line in skipped)
    assert "left out because they do not decode: 2" in said
    assert "1 other files are left alone (.txt)" in said
    assert "1 files or folders cannot be read" in said
    assert "a link to a folder that was read already" in said
    assert "1 names hold further dots" in said
    assert "cat_a_b of cat/a.b.jpg" in said
    assert "their extension tells another format: 1" in said
    assert json.loads((out / "_info.json").read_text())["splits"]["train"]["num_samples"] == 7
    assert main(["verify", str(out), "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("files", "splits", "classes"),
    [
        (["train/cat/1.jpg", "val/cat/2.jpg", "test/cat/3.jpg", "extras/x.jpg"], ["train", "validation"], ["cat"]),
        (["train/cat/1.jpg", "train/dog/1.jpg"], ["train"], ["cat", "dog"]),
        (["validation/cat/1.jpg", "validation/dog/1.jpg"], ["validation"], ["cat", "dog"]),
        (["train/1.jpg", "bus/1.jpg"], ["train"], ["bus", "train"]),
        (["val/x/1.jpg", "bus/1.jpg"], ["train"], ["bus", "val"]),
    ],
)
def test_layouts_are_told_apart(tmp_path: Path, files: list[str], splits: list[str], classes: list[str]) -> None:
    for name in files:
        write(tmp_path / "tree" / name, jpeg())
    images = read_folder(tmp_path / "tree", limit_classes=None)
    assert (list(images.splits), list(images.classes)) == (splits, classes)
    assert sum(len(catalogue) for catalogue in images.splits.values()) == 2


def test_a_split_without_one_good_image_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "tree" / "cat" / "1.jpg", b"<!DOCTYPE html>")
    assert main(["folder", str(tmp_path / "tree"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "none of the images in the train split decodes" in capsys.readouterr().err


def test_layouts_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flat").mkdir()
    write(tmp_path / "unknown" / "train" / "cat" / "1.jpg", jpeg())
    write(tmp_path / "unknown" / "val" / "dog" / "1.jpg", jpeg())
    write(tmp_path / "hollow" / "cat" / "notes.txt", b"text")
    write(tmp_path / "twins" / "cat" / "1.jpg", jpeg())
    (tmp_path / "twins" / "feline").symlink_to("cat")
    for tree, words in (
        ("flat", "no image in the train split"),
        ("unknown", "the class dog"),
        ("hollow", "no image in the train split"),
        ("twins", "the classes cat and feline in"),
        ("missing", "there is no "),
    ):
        assert main(["folder", str(tmp_path / tree), "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "options", "splits"),
    [
        (["1.jpg", "b.c.jpg"], (), {"train": 2}),
        (["2023/a/1.jpg", "2024/1.jpg", "1.jpg"], ("--no-labels",), {"train": 3}),
        (["train/1.jpg", "val/1.jpg"], (), {"train": 1, "validation": 1}),
        (["train/1.jpg", "train/deep/1.jpg", "other/1.jpg"], ("--no-labels",), {"train": 2}),
    ],
)
def test_images_without_labels(
    tmp_path: Path,
    files: list[str],
    options: tuple[str, ...],
    splits: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, name in enumerate(files):
        write(tmp_path / "tree" / name, jpeg(number))
    out = pack(tmp_path / "tree", tmp_path / "out", *options)
    assert "for pre-training, not for k-NN or fine-tuning" in capsys.readouterr().out
    for split, count in splits.items():
        samples = read(out, split)
        assert len(samples) == count
        assert all("cls" not in sample and "label" not in json.loads(sample["json"]) for sample in samples.values())
    assert {
        split: part["num_samples"] for split, part in json.loads((out / "_info.json").read_text())["splits"].items()
    } == splits
    assert main(["verify", str(out), "--workers", "1"]) == 0
    assert main(["describe", str(out), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "without labels" in said
    assert "data.mean=[" in said


def test_what_is_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    for name in ("train/cat/1.jpg", "train/dog/1.jpg", "train/loose.jpg", "val/cat/1.jpg"):
        write(tree / name, jpeg())
    (tree / "train" / "round").symlink_to(tree / "train" / "round")
    (tree / "train" / "cat" / "nowhere.jpg").symlink_to(tree / "gone.jpg")
    pack(tree, tmp_path / "out")
    said = capsys.readouterr().out
    assert "train: 1 images beside the class folders are left out, as loose.jpg; --no-labels packs" in said
    assert "validation: 1 images of 2 classes" in said
    assert "no image of 1 of them, as of dog" in said
    assert "2 files or folders cannot be read" in said


@pytest.mark.parametrize(
    ("files", "options", "classes"),
    [
        (["cat/1.jpg", "dog/1.jpg", "dog/deep/2.jpg"], (), ["cat", "dog"]),
        (["cat/1.jpg", "dog/1.jpg", "dog/deep/2.jpg"], ("--no-labels",), []),
        (["1.jpg", "2.jpg", "3.jpg"], (), []),
    ],
)
def test_links_in_a_circle_are_told_and_packing_goes_on(
    tmp_path: Path, files: list[str], options: tuple[str, ...], classes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Links to the tree itself, and to the folders around it, from the tree and from the folders in it."""
    tree = tmp_path / "around" / "tree"
    for number, name in enumerate(files):
        write(tree / name, jpeg(number))
    write(tmp_path / "around" / "beside.jpg", jpeg(99))
    folders = sorted({tree, *((tree / name).parent for name in files)})
    for folder in folders:
        (folder / "again").symlink_to(tree)
        (folder / "above").symlink_to(tmp_path / "around")
        (folder / "zelf").symlink_to(folder)
    out = pack(tree, tmp_path / "out", *options)
    said = capsys.readouterr().out
    names = {json.loads(sample["json"])["filename"] for sample in read(out, "train").values()}
    assert names == set(files)
    assert json.loads((out / "manifest.json").read_text())["settings"]["classes"] == classes
    assert f"{3 * len(folders)} files or folders cannot be read" in said
    assert "(a link to a folder " in said
    pack(tree, out, *options)  # finds the same again, and keeps it
    assert "1 of 1 shards were there already" in capsys.readouterr().out


def test_links_in_a_circle_beside_train_and_val_are_told(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("train/cat/1.jpg", "val/cat/1.jpg"):
        write(tree / name, jpeg())
    (tree / "again").symlink_to(tree)
    (tree / "val" / "again").symlink_to(tree)
    images = read_folder(tree)
    assert {split: len(catalogue) for split, catalogue in images.splits.items()} == {"train": 1, "validation": 1}
    assert images.classes == ["cat"]
    assert any(note.startswith("left alone:") and "again (a link to a folder " in note for note in images.notes)
    assert any(note.startswith("validation: 1 images of 1 classes") and "around it" in note for note in images.notes)


def test_what_is_no_image_is_told_by_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1.HEIC", "2.heic", "a/3.heic", "a/4.mp4", "README"):
        write(tmp_path / "phone" / name, b"x")
    assert main(["folder", str(tmp_path / "phone"), "--no-labels", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "there is no image in the train split (train: 0 images in" in said
    assert "5 other files are left alone (.heic, no suffix, .mp4)" in said
    assert "images end in .bmp, .gif, .jpeg," in said


def test_shards_are_not_put_among_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next call would find a class named shards."""
    for name in ("flat/1.jpg", "whole/train/cat/1.jpg", "whole/val/cat/1.jpg"):
        write(tmp_path / name, jpeg())
    for out in ("flat", "flat/shards"):
        assert main(["folder", str(tmp_path / "flat"), "--out", str(tmp_path / out), "--workers", "1"]) == 2
        assert "where images are searched: give one beside it" in capsys.readouterr().err
    assert not (tmp_path / "flat" / "shards").exists()
    pack(tmp_path / "whole", tmp_path / "whole" / "shards")  # beside its train and val nothing is searched
    pack(tmp_path / "whole", tmp_path / "whole" / "shards")
    assert "2 of 2 shards were there already" in capsys.readouterr().out


def test_a_folder_inside_the_tree_goes_by_its_own_name(tmp_path: Path) -> None:
    write(tmp_path / "tree" / "b" / "1.jpg", jpeg())
    (tmp_path / "tree" / "a").symlink_to(tmp_path / "tree" / "b")
    write(tmp_path / "far" / "2.jpg", jpeg())
    (tmp_path / "tree" / "c").symlink_to(tmp_path / "far")
    found = find_images(tmp_path / "tree", "")
    assert found.names == [b"b/1.jpg", b"c/2.jpg"]
    assert len(found.unreadable) == 1


def test_a_file_that_goes_away_is_left_out(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        write(tmp_path / "tree" / name, jpeg())
    images = read_folder(tmp_path / "tree")
    (tmp_path / "tree" / "2.jpg").unlink()
    packing.pack(images, tmp_path / "out", settings=packing.PackSettings(dataset="photos"), workers=1)
    assert len(read(tmp_path / "out", "train")) == 1
    assert "No such file" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_demo_is_the_same_every_time_and_balanced(tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert main(["demo", "--samples", "120", "--samples-per-shard", "32", "--out", str(tmp_path / name)]) == 0
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "demo-train-0002.tar" in names
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in names)
    manifest = json.loads((tmp_path / "first" / "manifest.json").read_text())
    assert manifest["settings"]["classes"] == sorted(CLASSES)
    train, validation = read(tmp_path / "first", "train"), read(tmp_path / "first", "validation")
    assert (len(train), len(validation)) == (96, 24)
    for samples, each in ((train, 8), (validation, 2)):
        labels = [int(sample["cls"]) for sample in samples.values()]
        assert np.bincount(labels).tolist() == [each] * len(CLASSES)
        assert {Image.open(io.BytesIO(sample["jpg"])).size for sample in samples.values()} == {(64, 64)}
    assert not {sample["jpg"] for sample in train.values()} & {sample["jpg"] for sample in validation.values()}


def edge_features(images: np.ndarray) -> np.ndarray:
    """Where edges of each direction lie, coarsely, and how many there are: a stand-in for learnt features."""
    grey = images.mean(axis=-1)
    along_x, along_y = np.gradient(grey, axis=2), np.gradient(grey, axis=1)
    strength = np.hypot(along_x, along_y)
    sector = (np.arctan2(along_y, along_x) % np.pi / np.pi * 9).astype(int) % 9
    features = [
        np.histogram(sector[i], bins=9, range=(0, 9), weights=strength[i])[0] / strength[i].sum()
        for i in range(len(images))
    ]
    contrast = np.stack([np.quantile(strength, q, axis=(1, 2)) / strength.max(axis=(1, 2)) for q in (0.7, 0.8, 0.9)], 1)
    return np.concatenate([np.array(features), contrast], axis=1)


def nearest_neighbour_accuracy(train: np.ndarray, test: np.ndarray, labels: np.ndarray, truth: np.ndarray) -> float:
    scale = train.std(axis=0) + 1e-9
    distance = ((test[:, None] / scale - train[None] / scale) ** 2).sum(axis=-1)
    return float((labels[distance.argmin(axis=1)] == truth).mean())


def test_demo_classes_show_in_edges_and_not_in_pixels() -> None:
    """The demo is there to show that pre-training on gradients helps, so raw pixels must not give the class away."""
    images = draw_image_set(600, seed=0, image_size=64)
    pixels, labels = {}, {}
    for split, catalogue in images.splits.items():
        records = catalogue.records(range(len(catalogue)))
        decoded = [np.asarray(Image.open(io.BytesIO(record.source.read()))) for record in records]
        pixels[split] = np.stack(decoded).astype(np.float64) / 255
        labels[split] = np.array([record.label for record in records])
    truth = labels["validation"]
    small = {split: values[:, ::4, ::4].reshape(len(values), -1) for split, values in pixels.items()}
    edges = {split: edge_features(values) for split, values in pixels.items()}
    by_pixels = nearest_neighbour_accuracy(small["train"], small["validation"], labels["train"], truth)
    by_edges = nearest_neighbour_accuracy(edges["train"], edges["validation"], labels["train"], truth)
    assert by_pixels < 0.25
    assert by_edges > 2 * by_pixels
    assert by_edges > 0.4
