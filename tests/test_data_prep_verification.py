"""`verify` finds what is wrong, and `describe` counts what is there."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_prep.__main__ import main

Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "demo"
    assert main(["demo", "--samples", "60", "--size", "24", "--samples-per-shard", "20", "--out", str(out)]) == 0
    return out


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "demo"))


def rewrite(shard: Path, change: Callable[[Members], Members], *, adjust_manifest: bool) -> None:
    """Repack a shard with other members, with or without making the manifest agree."""
    with tarfile.open(shard) as archive:
        members = [(info.name, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as archive:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if adjust_manifest:
        path = shard.parent / "manifest.json"
        manifest = json.loads(path.read_text())
        entry = next(entry for entry in manifest["shards"] if entry["name"] == shard.name)
        entry["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
        path.write_text(json.dumps(manifest))


def replace_first(extension: str, data: bytes) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        position = next(i for i, (name, _) in enumerate(members) if name.endswith(f".{extension}"))
        return [*members[:position], (members[position][0], data), *members[position + 1 :]]

    return change


def rename_first(old: str, new: str) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        position = next(i for i, (name, _) in enumerate(members) if name.endswith(f".{old}"))
        name, data = members[position]
        return [*members[:position], (name.removesuffix(old) + new, data), *members[position + 1 :]]

    return change


def verify(folder: Path) -> int:
    return main(["verify", str(folder), "--workers", "1"])


def test_all_is_well(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(packed) == 0
    assert "4 shards with 60 samples: all checks passed" in capsys.readouterr().out


def test_workers_verify_the_same(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(packed), "--workers", "2"]) == 0
    assert "60 samples" in capsys.readouterr().out


def drop_first_sample(members: Members) -> Members:
    return members[3:]


def repeat_first_sample(members: Members) -> Members:
    return members[:3] + members[3:-3] + members[:3]


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replace_first("cls", b"12"), "label 12 is not between 0 and 11"),
        (replace_first("cls", b"-1"), "label -1"),
        (replace_first("cls", b"\xff"), "cannot be read"),
        (replace_first("cls", b"cat"), "cannot be read"),
        (replace_first("json", b"{"), "cannot be read"),
        (replace_first("json", b"[]"), "its description says"),
        (replace_first("json", b'{"label": 0, "height": 1, "width": 1}'), "its description says"),
        (replace_first("jpg", b"no image"), "does not decode"),
        (replace_first("jpg", b""), "does not decode"),
        (replace_first("jpg", png((24, 24))), "is .png by its content"),
        (rename_first("cls", "pyd"), "one image, cls and json belong"),
        (rename_first("json", "png"), "one image, cls and json belong"),
        (drop_first_sample, "it holds 15 samples, 16 were packed"),
        (repeat_first_sample, "occurs more than once"),
    ],
)
def test_what_is_wrong_is_told(
    shards: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Members], Members], words: str
) -> None:
    """Even when whoever changed the shard has brought the checksum in line."""
    rewrite(shards / "demo-train-0001.tar", change, adjust_manifest=True)
    assert verify(shards) == 1
    said = capsys.readouterr().out
    assert "demo-train-0001.tar: " in said
    assert words in said
    assert "FAILED" in said


def flip_a_pixel(shards: Path) -> None:
    with open(shards / "demo-train-0000.tar", "r+b") as file:
        file.seek(2500)
        byte = file.read(1)[0]
        file.seek(2500)
        file.write(bytes([byte ^ 1]))


def cut_off(shards: Path) -> None:
    path = shards / "demo-train-0000.tar"
    path.write_bytes(path.read_bytes()[:5000])


def remove(shards: Path) -> None:
    (shards / "demo-train-0000.tar").unlink()


def add_a_shard(shards: Path) -> None:
    shutil.copy(shards / "demo-train-0000.tar", shards / "demo-train-0009.tar")


def swap_sizes(shards: Path) -> None:
    (shards / "sizes.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_pixel, "checksum differs"),
        (cut_off, "demo-train-0000.tar: "),
        (remove, "the file is missing"),
        (add_a_shard, "demo-train-0009.tar is not in manifest.json"),
        (swap_sizes, "sizes.json does not agree"),
    ],
)
def test_damaged_folders(
    shards: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], words: str
) -> None:
    damage(shards)
    assert verify(shards) == 1
    assert words in capsys.readouterr().out


def test_folders_without_a_manifest(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, words in (
        ("{", "is damaged (Expecting property name"),
        ('{"format": 1}', "is damaged (it lacks 'settings')"),
        ("[" * 100_000, "is damaged (it is nested too deeply)"),
    ):
        (shards / "manifest.json").write_text(text)
        assert verify(shards) == 2
        assert words in capsys.readouterr().err
    (shards / "manifest.json").unlink()
    assert verify(shards) == 2
    assert "no manifest.json" in capsys.readouterr().err
    (shards / "packing.jsonl").touch()
    assert verify(shards) == 2
    assert "not finished" in capsys.readouterr().err
    assert verify(tmp_path / "missing") == 2
    assert f"there is no {tmp_path / 'missing'}" in capsys.readouterr().err


def test_describe_counts(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(shards), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "train: 48 samples (48 jpg)" in said
    assert "images per class: 4 to 4, median 4, 0 classes without any" in said
    assert "validation: 12 samples" in said
    figure = Image.open(shards / "describe.png")
    figure.load()
    assert figure.width > 400


def test_describe_shows_imbalance_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count, side in (("common", 9, 40), ("rare", 1, 10)):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (side, side * 2)).save(tmp_path / "tree" / name / f"{number}.png")
    out = tmp_path / "out"
    assert main(["folder", str(tmp_path / "tree"), "--out", str(out), "--workers", "1"]) == 0
    capsys.readouterr()
    png_path = tmp_path / "elsewhere.png"
    assert main(["describe", str(out), "--workers", "1", "--png", str(png_path)]) == 0
    said = capsys.readouterr().out
    assert "images per class: 1 to 9, median 5" in said
    assert "fewest: rare 1, common 9" in said
    bars = [line.split() for line in said.splitlines() if "#" in line]
    assert [int(words[-1]) for words in bars] == [1, 9]
    assert png_path.exists()
    assert not (out / "describe.png").exists()
