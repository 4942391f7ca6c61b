"""ImageNet's archives in miniature: the right images, labels and bytes, read back by the readers people use."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from data_prep.__main__ import main

SAMPLES_PER_SHARD = 16


@pytest.fixture(scope="module")
def archives(shared_dir: Path) -> Path:
    return shared_dir / "images" / "imagenet_mini"


def archive_options(archives: Path) -> list[str]:
    return [
        *("--train", str(archives / "ILSVRC2012_img_train.tar")),
        *("--val", str(archives / "ILSVRC2012_img_val.tar")),
        *("--devkit", str(archives / "ILSVRC2012_devkit_t12.tar.gz")),
    ]


def pack(out: Path, *options: str) -> Path:
    status = main(
        ["imagenet", *options, "--out", str(out), "--workers", "1", "--samples-per-shard", str(SAMPLES_PER_SHARD)]
    )
    assert status == 0
    return out


@pytest.fixture(scope="module")
def shards(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("shards") / "imagenet", *archive_options(archives))


@pytest.fixture(scope="module")
def extracted(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archives unpacked as people unpack them: train/<wnid>/*.JPEG and a flat val."""
    root = tmp_path_factory.mktemp("extracted")
    for name, data in original_train(archives):
        folder = root / "train" / name.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (root / "val").mkdir()
    for name, data in read_tar((archives / "ILSVRC2012_img_val.tar").read_bytes()):
        (root / "val" / name).write_bytes(data)
    return root


def read_tar(archive: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        for info in file:
            content = file.extractfile(info)
            if content is not None:
                yield info.name, content.read()


def original_train(archives: Path) -> Iterator[tuple[str, bytes]]:
    for _, inner in read_tar((archives / "ILSVRC2012_img_train.tar").read_bytes()):
        yield from read_tar(inner)


def read_with_webdataset(shards: Path, split: str) -> dict[str, dict[str, bytes]]:
    import webdataset

    paths = sorted(str(path) for path in shards.glob(f"*-{split}-*.tar"))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    by_key = {sample["__key__"]: sample for sample in samples}
    assert len(by_key) == len(samples)
    return by_key


def member_names(shard: Path) -> list[str]:
    with tarfile.open(shard) as archive:
        return archive.getnames()


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    return names == sorted(path.name for path in second.iterdir()) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


def kit_tables(archives: Path) -> tuple[dict[int, str], list[int]]:
    """ILSVRC2012_ID -> wnid of the leaves, and the validation labels, read without the code under test."""
    import scipy.io

    with tarfile.open(archives / "ILSVRC2012_devkit_t12.tar.gz") as kit:
        files = {info.name.rsplit("/", 1)[-1]: kit.extractfile(info) for info in kit if info.isfile()}
        synsets = scipy.io.loadmat(io.BytesIO(files["meta.mat"].read()))["synsets"].ravel()
        truth = [int(word) for word in files["ILSVRC2012_validation_ground_truth.txt"].read().split()]
    leaves = [row for row in synsets if row["num_children"].item() == 0]
    return {row["ILSVRC2012_ID"].item(): str(row["WNID"].item()) for row in leaves}, truth


def test_every_training_image_arrives_with_its_bytes_and_label(archives: Path, shards: Path) -> None:
    wnid_of_id, _ = kit_tables(archives)
    wnids = sorted(wnid_of_id.values())
    assert len(wnids) == 1000
    samples = read_with_webdataset(shards, "train")
    originals = dict(original_train(archives))
    assert len(samples) == len(originals) == 100
    for name, data in originals.items():
        key = name.removesuffix(".JPEG")
        sample = samples[key]
        image = Image.open(io.BytesIO(data))
        assert sample["png" if image.format == "PNG" else "jpg"] == data
        label = wnids.index(key.split("_")[0])
        assert sample["cls"] == str(label).encode()
        facts = {"filename": name, "label": label, "height": image.height, "width": image.width}
        assert json.loads(sample["json"]) == facts


def test_validation_labels_go_through_the_wnids(archives: Path, shards: Path) -> None:
    wnid_of_id, truth = kit_tables(archives)
    wnids = sorted(wnid_of_id.values())
    samples = read_with_webdataset(shards, "validation")
    labels = [int(samples[f"ILSVRC2012_val_{number:08d}"]["cls"]) for number in range(1, len(truth) + 1)]
    assert labels == [wnids.index(wnid_of_id[number]) for number in truth]
    # the two tempting shortcuts give other labels for most of these images
    assert sum(label == number - 1 for label, number in zip(labels, truth, strict=True)) < len(truth) / 2
    assert len(labels) == len(samples) == 40


def test_known_labels(shards: Path) -> None:
    """Public facts of the 1000 classes: 0 is the tench, 230 the Shetland sheepdog."""
    samples = read_with_webdataset(shards, "train")
    labels = {key.split("_")[0]: int(sample["cls"]) for key, sample in samples.items()}
    assert labels["n01440764"] == 0
    assert labels["n02105855"] == 230


def test_disguised_and_odd_images_survive(archives: Path, shards: Path) -> None:
    samples = read_with_webdataset(shards, "train")
    assert samples["n02105855_2933"]["png"].startswith(b"\x89PNG")
    assert "jpg" not in samples["n02105855_2933"]
    assert Image.open(io.BytesIO(samples["n01491361_31"]["jpg"])).mode == "CMYK"
    assert (shards / "skipped.jsonl").read_bytes() == b""


def test_descriptions_are_those_of_timm_and_open_clip(shards: Path) -> None:
    info = json.loads((shards / "_info.json").read_text())
    train, validation = info["splits"]["train"], info["splits"]["validation"]
    assert train["filenames"] == [f"imagenet1k-train-{number:04d}.tar" for number in range(7)]
    assert validation["filenames"] == [f"imagenet1k-validation-{number:02d}.tar" for number in range(3)]
    assert train["num_samples"] == sum(train["shard_lengths"]) == 100
    assert max(train["shard_lengths"]) - min(train["shard_lengths"]) <= 1
    sizes = json.loads((shards / "sizes.json").read_text())
    for split in (train, validation):
        for name, length in zip(split["filenames"], split["shard_lengths"], strict=True):
            assert sizes[name] == length == len({name.split(".")[0] for name in member_names(shards / name)})


def test_members_are_adjacent_and_without_time(shards: Path) -> None:
    with tarfile.open(shards / "imagenet1k-train-0000.tar") as shard:
        members = shard.getmembers()
    assert all(member.mtime == 0 and member.isreg() for member in members)
    keys = [member.name.split(".")[0] for member in members]
    assert keys[0::3] == keys[1::3] == keys[2::3]


def test_shuffle_mixes_classes_and_follows_the_seed(archives: Path, shards: Path, tmp_path: Path) -> None:
    first = list(read_with_webdataset(shards, "train"))
    assert first != sorted(first)
    other = pack(tmp_path / "other", *archive_options(archives), "--seed", "1")
    second = list(read_with_webdataset(other, "train"))
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("split", ["train", "validation"])
def test_timm_reads_the_shards(shards: Path, split: str) -> None:
    from timm.data.readers.reader_wds import ReaderWds

    reader = ReaderWds(str(shards), split=split)
    expected = sorted(int(sample["cls"]) for sample in read_with_webdataset(shards, split).values())
    images, labels = zip(*reader, strict=True)
    assert len(reader) == len(labels) == len(expected)
    assert sorted(labels) == expected
    assert {image.mode for image in images} == {"RGB"}


def test_extracted_folders_give_the_same_shards(archives: Path, shards: Path, extracted: Path, tmp_path: Path) -> None:
    devkit = str(archives / "ILSVRC2012_devkit_t12.tar.gz")
    options = ["--train", str(extracted / "train"), "--val", str(extracted / "val"), "--devkit", devkit]
    assert same_files(pack(tmp_path / "out", *options), shards)


def test_kaggle_layout_gives_the_same_shards(archives: Path, shards: Path, extracted: Path, tmp_path: Path) -> None:
    root = tmp_path / "kaggle"
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    images.parent.mkdir(parents=True)
    shutil.copytree(extracted, images)
    wnid_of_id, truth = kit_tables(archives)
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} a, b\n" for wnid in wnid_of_id.values()))
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for position in reversed(range(len(truth))):
            name = f"ILSVRC2012_val_{position + 1:08d}"
            rows.writerow([name, f"{wnid_of_id[truth[position]]} 1 2 30 40 {wnid_of_id[1]} 5 6 7 8 "])
    assert same_files(pack(tmp_path / "out", "--kaggle", str(root)), shards)


def test_validation_archive_may_list_its_images_in_any_order(archives: Path, shards: Path, tmp_path: Path) -> None:
    images = list(read_tar((archives / "ILSVRC2012_img_val.tar").read_bytes()))
    shuffled = tmp_path / "val.tar"
    with tarfile.open(shuffled, "w") as archive:
        for name, data in reversed(images):
            info = tarfile.TarInfo(f"./val/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    out = pack(tmp_path / "out", "--val", str(shuffled), "--devkit", str(archives / "ILSVRC2012_devkit_t12.tar.gz"))
    for name in ("imagenet1k-validation-00.tar", "imagenet1k-validation-02.tar"):
        assert (out / name).read_bytes() == (shards / name).read_bytes()
    assert list(json.loads((out / "_info.json").read_text())["splits"]) == ["validation"]


def test_training_images_alone_take_their_own_classes(archives: Path, tmp_path: Path) -> None:
    out = pack(tmp_path / "out", "--train", str(archives / "ILSVRC2012_img_train.tar"), "--limit-classes", "10")
    samples = read_with_webdataset(out, "train")
    wnids = sorted({name.split("_")[0] for name, _ in original_train(archives)})[:10]
    assert {key.split("_")[0]: int(sample["cls"]) for key, sample in samples.items()} == {
        wnid: label for label, wnid in enumerate(wnids)
    }


def test_shrunk_images(archives: Path, tmp_path: Path) -> None:
    out = pack(
        tmp_path / "out", "--train", str(archives / "ILSVRC2012_img_train.tar"), "--resize-shorter", "128",
        "--quality", "90", "--limit-classes", "30",
    )  # fmt: skip
    originals = {name.removesuffix(".JPEG"): data for name, data in original_train(archives)}
    samples = read_with_webdataset(out, "train")
    assert len(samples) == 30
    for key, sample in samples.items():
        before = Image.open(io.BytesIO(originals[key]))
        after = Image.open(io.BytesIO(sample["jpg"]))
        if min(before.size) <= 128:
            assert sample["jpg"] == originals[key]
            continue
        assert min(after.size) == 128
        assert after.mode == ("L" if before.mode == "L" else "RGB")
        assert max(after.size) == round(max(before.size) * 128 / min(before.size))
        facts = json.loads(sample["json"])
        assert (facts["width"], facts["height"]) == after.size


def corrupt(archive: Path, to: Path, *, keep: int) -> Path:
    to.write_bytes(archive.read_bytes()[:keep])
    return to


def test_damaged_archives_are_refused(archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = archives / "ILSVRC2012_img_train.tar"
    size = train.stat().st_size
    page = tmp_path / "page.tar"
    page.write_text("<!DOCTYPE html><title>404</title>" * 100)
    cut_in_member = corrupt(train, tmp_path / "cut.tar", keep=size // 2)
    with tarfile.open(train) as archive:
        first = archive.getmembers()[0]
    boundary = 512 + -(-first.size // 512) * 512
    cut_at_boundary = corrupt(train, tmp_path / "boundary.tar", keep=boundary)
    broken_header = tmp_path / "header.tar"
    data = bytearray(train.read_bytes())
    data[boundary + 10] ^= 0xFF
    broken_header.write_bytes(bytes(data))
    for path in (page, cut_in_member, cut_at_boundary, broken_header):
        out = tmp_path / f"out-{path.stem}"
        assert main(["imagenet", "--train", str(path), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert error.count("\n") == 1
        assert not out.exists()


def negative_size(header: bytearray) -> None:
    header[124:136] = b"\xff" * 12  # base 256: -1


def negative_extended_header(header: bytearray) -> None:
    negative_size(header)
    header[156:157] = b"x"


@pytest.mark.parametrize("damage", [negative_size, negative_extended_header])
def test_archives_made_to_hang_the_reader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytearray], None]
) -> None:
    header = bytearray(tarfile.TarInfo("n01440764.tar").tobuf())
    damage(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\x00 " % sum(header)
    archive = tmp_path / "train.tar"
    archive.write_bytes(bytes(header) * 3 + bytes(10240))
    assert main(["imagenet", "--train", str(archive), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(archive) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val": "ILSVRC2012_img_val.tar"}, "--devkit"),
        ({"train": "ILSVRC2012_img_val.tar"}, "not the archive of the training images"),
        ({"val": "ILSVRC2012_img_train.tar", "devkit": "ILSVRC2012_devkit_t12.tar.gz"}, "validation images"),
        ({"train": "ILSVRC2012_devkit_t12.tar.gz"}, "compressed"),
        ({"train": "ILSVRC2012_img_train.tar", "devkit": "ILSVRC2012_img_val.tar"}, "meta.mat"),
        ({"train": "missing.tar"}, "there is no"),
        ({}, "--train"),
        ({"kaggle": ".", "train": "ILSVRC2012_img_train.tar"}, "--kaggle"),
        ({"kaggle": "."}, "CLS-LOC"),
    ],
)
def test_wrong_files_are_told_in_one_sentence(
    archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, str], words: str
) -> None:
    given = [word for name, file in options.items() for word in (f"--{name}", str(archives / file))]
    assert main(["imagenet", *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_member_names_never_touch_the_file_system(tmp_path: Path) -> None:
    """Paths that climb out, absolute paths and links in an archive are text, or nothing."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        for name in ("../../escaped.JPEG", f"{tmp_path}/absolute.JPEG", "plain.JPEG"):
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            archive.addfile(info, io.BytesIO(buffer.getvalue()))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("passwords.JPEG")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    outer = tmp_path / "train.tar"
    with tarfile.open(outer, "w") as archive:
        info = tarfile.TarInfo("../n01440764.tar")
        info.size = len(inner.getvalue())
        archive.addfile(info, io.BytesIO(inner.getvalue()))
    before = set(os.listdir(tmp_path)) | {"out"}
    out = pack(tmp_path / "out", "--train", str(outer))
    assert set(os.listdir(tmp_path)) == before
    assert set(read_with_webdataset(out, "train")) == {"escaped", "absolute", "plain"}
