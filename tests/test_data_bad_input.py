"""Broken shards and samples: each ends in one sentence or in a counted substitute, and nothing in a shard runs."""

from __future__ import annotations

import io
import json
import logging
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import run_ranks
from tiny_shards import jpeg_of, open_loader, write_shards, write_tar

from vitfreeze.data import EvalLoader, ReadOptions, ShardError, TrainLoader, merge_reports
from vitfreeze.engine import join_ranks

MakeLoader = Callable[..., TrainLoader]


@pytest.fixture
def make_loader(tmp_path: Path) -> MakeLoader:
    def make(shards: object, **settings: object) -> TrainLoader:
        defaults = {
            "img_size": 16,
            "num_patches": 4,
            "global_batch": 4,
            "micro_batch": 4,
            "workers": 0,
            "max_bad_fraction": 0.2,
            "cache_dir": tmp_path / "cache",
        }
        return open_loader(shards, **(defaults | settings))

    return make


def good_members(start: int, stop: int) -> list[tuple[str, bytes]]:
    return [
        member
        for number in range(start, stop)
        for member in (
            (f"s{number:03d}.jpg", jpeg_of((90 + number, 200, 60))),
            (f"s{number:03d}.cls", str(number).encode()),
        )
    ]


def read_epoch(loader: TrainLoader) -> list[str]:
    return [key for batch in loader.batches(0, loader.steps_per_epoch) for key in batch.keys]


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which must be one sentence on one line."""
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def declare(folder: Path, lengths: dict[str, int]) -> None:
    (folder / "sizes.json").write_text(json.dumps(lengths))


# ------------------------------------------------------------------------------------------------- whole shards


def test_truncated_shard_with_a_known_length_is_counted(tmp_path: Path, make_loader: MakeLoader) -> None:
    folder = write_shards(tmp_path / "shards", [20, 20])
    whole = (folder / "tiny-train-0001.tar").read_bytes()
    (folder / "tiny-train-0001.tar").write_bytes(whole[: int(len(whole) * 0.83)])
    loader = make_loader(folder, max_bad_fraction=0.3)
    keys = read_epoch(loader)
    (report,) = loader.take_reports()
    lost = report.skipped_per_shard[str(folder / "tiny-train-0001.tar")]
    assert list(report.skipped_per_shard) == [str(folder / "tiny-train-0001.tar")]
    assert 1 <= lost <= 8
    assert len(keys) == 40
    assert len(set(keys)) == 40 - lost
    with pytest.raises(ShardError, match=r"max_bad_fraction=0.01.*tiny-train-0001.tar") as error:
        read_epoch(make_loader(folder, max_bad_fraction=0.01))
    message_of(error)


@pytest.mark.parametrize("cut", ["in a member", "between members"])
def test_truncated_shard_of_unknown_length_is_refused(tmp_path: Path, make_loader: MakeLoader, cut: str) -> None:
    path = write_tar(tmp_path / "a.tar", good_members(0, 10))
    with tarfile.open(path) as archive:
        member = archive.getmembers()[8]
    path.write_bytes(path.read_bytes()[: member.offset if cut == "between members" else member.offset_data + 99])
    with pytest.raises(ShardError, match=r"a\.tar holds [45] samples and then breaks off") as error:
        make_loader(str(path))
    message_of(error)


def zero_middle(data: bytes) -> bytes:
    part = len(data) // 3 // 512 * 512
    return data[:part] + bytes(part) + data[2 * part :]


def zero_one_header(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        start = archive.getmembers()[8].offset
    return data[:start] + bytes(512) + data[start + 512 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (zero_middle, "goes on behind tar's mark of an end"),
        (zero_one_header, "goes on behind tar's mark of an end"),
        (lambda data: data + data, "goes on behind tar's mark of an end"),
        (lambda data: data[:-10240] + bytes(3 << 20), "bytes of zeros, which no tar program writes"),
    ],
)
def test_damaged_shard_does_not_pass_for_a_shorter_one(
    tmp_path: Path, make_loader: MakeLoader, damage: Callable[[bytes], bytes], words: str
) -> None:
    path = write_tar(tmp_path / "a.tar", good_members(0, 64))
    whole = path.read_bytes()
    assert make_loader(str(path)).lengths == [64]
    path.write_bytes(damage(whole))
    with pytest.raises(ShardError, match=rf"shard .*a\.tar holds \d+ samples and then .*{words}") as error:
        make_loader(str(path))
    message_of(error)
    path.write_bytes(whole + bytes(1 << 19))  # a record of tar's may be long
    assert make_loader(str(path)).lengths == [64]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>404 Not Found</html>" * 30, "is a web page"),
        (b"\n  <Error><Code>AccessDenied</Code></Error>" * 30, "is a web page"),
        (b"", "is empty"),
        (b"\x1f\x8b\x08" + bytes(2000), "is compressed by gzip"),
        (b"not a tar file at all" * 200, "is not a tar file"),
        (b"short", "is not a tar file"),
    ],
)
def test_what_is_no_tar_file_is_named(tmp_path: Path, make_loader: MakeLoader, content: bytes, words: str) -> None:
    write_tar(tmp_path / "t-0000.tar", good_members(0, 10))
    (tmp_path / "t-0001.tar").write_bytes(content)
    with pytest.raises(ShardError, match=f"t-0001.tar {words}") as error:
        make_loader(str(tmp_path / "t-{0000..0001}.tar"))
    message_of(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_web_page_found_only_when_read_is_named(tmp_path: Path, make_loader: MakeLoader, workers: int) -> None:
    folder = write_shards(tmp_path / "shards", [10, 10])
    (folder / "tiny-train-0001.tar").write_bytes(b"<html>Service Unavailable</html>")
    loader = make_loader(folder, workers=workers)
    with pytest.raises(ShardError, match=r"tiny-train-0001\.tar is a web page") as error:
        read_epoch(loader)
    message_of(error)


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_that_vanishes_is_named(tmp_path: Path, make_loader: MakeLoader, workers: int) -> None:
    folder = write_shards(tmp_path / "shards", [10, 10, 10])
    loader = make_loader(folder, workers=workers, window_shards=1)
    batches = loader.batches(0, 100)
    next(batches)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(ShardError, match=r"tar cannot be opened \(No such file.*it was there at the start") as error:
        list(batches)
    message_of(error)


def test_shard_longer_than_declared_is_refused(tmp_path: Path, make_loader: MakeLoader) -> None:
    write_tar(tmp_path / "a.tar", good_members(0, 10))
    declare(tmp_path, {"a.tar": 9})
    with pytest.raises(ShardError, match=r"holds 10 samples, but .* says 9") as error:
        read_epoch(make_loader(str(tmp_path / "a.tar")))
    message_of(error)


def test_sources_that_name_nothing_useful(tmp_path: Path, make_loader: MakeLoader) -> None:
    write_tar(tmp_path / "mixed" / "x-train-0000.tar", good_members(0, 4))
    write_tar(tmp_path / "mixed" / "x-validation-0000.tar", good_members(4, 8))
    (tmp_path / "empty").mkdir()
    path = str(tmp_path / "mixed" / "x-train-0000.tar")
    folder = write_shards(tmp_path / "shards", [10])
    for source, words in [
        (str(tmp_path / "none-{0..3}.tar"), "none-0.tar does not exist"),
        (tmp_path / "empty", "holds no"),
        (tmp_path / "mixed", "several sets of shards"),
        ([path, path], "listed twice"),
        ([], "no shard is named"),
        ("pipe:cat x.tar", "allow_pipe"),
        ("nosuchscheme://bucket/x.tar", "nosuchscheme"),
    ]:
        with pytest.raises(ShardError, match=words) as error:
            make_loader(source)
        message_of(error)
    with pytest.raises(ShardError, match=r"describes the splits \['train'\], not 'validation'"):
        make_loader(folder, split="validation")
    (folder / "_info.json").write_text("<html>")
    with pytest.raises(ShardError, match="is not valid JSON"):
        make_loader(folder)


def test_info_file_cannot_name_files_elsewhere(tmp_path: Path, make_loader: MakeLoader) -> None:
    folder = write_shards(tmp_path / "shards", [10])
    split = {"filenames": ["../../etc/passwd"], "shard_lengths": [10], "num_samples": 10, "name": "train"}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    with pytest.raises(ShardError, match="not the name of a file beside it"):
        make_loader(folder)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("_info.json", {"splits": {"train": {"filenames": ["tiny-train-0000.tar"]}}}, "as many filenames as shard_len"),
        ("_info.json", {"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": []}}}, "as many filenames as"),
        ("_info.json", {"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": ["x"]}}}, "as many filenames as"),
        ("_info.json", {"splits": ["train"]}, "must hold splits"),
        ("_info.json", {"name": "imagenet"}, "must hold splits"),
        ("sizes.json", {"tiny-train-0000.tar": None}, "must hold a number of samples for each shard"),
    ],
)
def test_a_description_that_is_none(
    tmp_path: Path, make_loader: MakeLoader, file: str, content: object, words: str
) -> None:
    folder = write_shards(tmp_path / "shards", [12], info=False)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ShardError, match=words) as error:
        make_loader(folder)
    message_of(error)


def test_unequal_shards_give_equal_steps(tmp_path: Path, make_loader: MakeLoader) -> None:
    folder = write_shards(tmp_path / "shards", [1, 30, 2, 9])
    settings = {"world_size": 2, "micro_batch": 2}
    ranks = [make_loader(folder, rank=rank, **settings) for rank in range(2)]
    assert [loader.steps_per_epoch for loader in ranks] == [10, 10]
    keys = [read_epoch(loader) for loader in ranks]
    assert len(keys[0]) == len(keys[1]) == 20
    assert len({*keys[0], *keys[1]}) == 40


# ------------------------------------------------------------------------------------------------ single samples


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def huge_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose frame header claims another size."""
    data = bytearray(jpeg_of((200, 90, 90)))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BROKEN = {
    "no image": ([("bad.cls", b"3"), ("bad.json", b"{}")], "it has no image"),
    "two images": ([("bad.jpg", jpeg_of((9, 99, 9))), ("bad.png", b"x"), ("bad.cls", b"1")], "it has 2 images"),
    "label that is no number": ([("bad.jpg", jpeg_of((9, 99, 9))), ("bad.cls", b"dog")], "label b'dog' is not a class"),
    "negative label": ([("bad.jpg", jpeg_of((9, 99, 9))), ("bad.cls", b"-1")], "label b'-1' is not a class"),
    "label too large": ([("bad.jpg", jpeg_of((9, 99, 9))), ("bad.cls", b"100")], "its label 100 is not below 100"),
    "no label": ([("bad.jpg", jpeg_of((9, 99, 9)))], "it has no label"),
    "duplicate key": ([("s000.jpg", jpeg_of((9, 99, 9))), ("s000.cls", b"1")], "its key occurs twice"),
    "empty image": ([("bad.jpg", b""), ("bad.cls", b"1")], "not a readable image"),
    "text for an image": ([("bad.jpg", b"<html>"), ("bad.cls", b"1")], "not a readable image"),
    "half a JPEG": ([("bad.jpg", jpeg_of((9, 99, 9), size=(200, 200))[:1500]), ("bad.cls", b"1")], "truncated"),
    "gigantic JPEG": ([("bad.jpg", huge_jpeg(65_000, 65_000)), ("bad.cls", b"1")], "claims 65000 x 65000 pixels"),
    "gigantic PNG": ([("bad.jpg", huge_png(12_000, 12_000)), ("bad.cls", b"1")], "claims 12000 x 12000 pixels"),
    "monstrous PNG": ([("bad.png", huge_png(2**31 - 1, 2**31 - 1)), ("bad.cls", b"1")], "pixels"),
    "PostScript": (
        [("bad.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("bad.cls", b"1")],
        "not a readable",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("declared", [True, False])
def test_bad_sample_is_replaced_and_counted(tmp_path: Path, make_loader: MakeLoader, kind: str, declared: bool) -> None:
    members, reason = BROKEN[kind]
    path = write_tar(tmp_path / "a.tar", good_members(0, 5) + members + good_members(5, 15))
    if declared:
        declare(tmp_path, {"a.tar": 16})
    settings = {"num_classes": 100, "max_bad_fraction": 1 / 16}
    loader = make_loader(str(path), **settings)
    batches = list(loader.batches(0, loader.steps_per_epoch))
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys) == sorted([f"s{number:03d}" for number in range(15)] + ["s005"])  # the next good one stands in
    (report,) = loader.take_reports()
    (skipped,) = report.skipped
    assert skipped.index == 5
    assert skipped.key == members[0][0].split(".")[0]
    assert skipped.shard == str(path)
    assert reason in skipped.reason
    assert "\n" not in skipped.reason

    two_ranks = [make_loader(str(path), rank=rank, world_size=2, micro_batch=2, **settings) for rank in range(2)]
    for whole, *halves in zip(batches, *(loader.batches(0, 4) for loader in two_ranks), strict=True):
        assert torch.equal(whole.images, torch.cat([half.images for half in halves]))
        assert torch.equal(whole.noise, torch.cat([half.noise for half in halves]))

    with pytest.raises(ShardError, match=r"1 of 16 samples of epoch 0 .*max_bad_fraction=0.001.*a\.tar") as error:
        read_epoch(make_loader(str(path), num_classes=100, max_bad_fraction=0.001))
    message_of(error)


def test_bad_sample_is_left_out_of_evaluation(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [*good_members(0, 5), ("bad.jpg", b"?"), ("bad.cls", b"0"), *good_members(5, 9)]
    )
    strict = ReadOptions(workers=0, cache_dir=tmp_path)
    loader = EvalLoader(str(path), img_size=16, batch_size=4, options=replace(strict, max_bad_fraction=0.1))
    assert [len(batch.images) for batch in loader] == [4, 3, 2]
    (report,) = loader.take_reports()
    assert [sample.key for sample in report.skipped] == ["bad"]
    with pytest.raises(ShardError, match=r"max_bad_fraction=0\.001"):
        list(EvalLoader(str(path), img_size=16, batch_size=4, options=strict))


def test_evaluation_of_a_few_images_tells_of_bad_ones_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "a.tar", [("bad.jpg", b"?"), ("bad.cls", b"0"), *good_members(0, 9)])
    options = ReadOptions(workers=0, cache_dir=tmp_path, max_bad_fraction=0.1)
    loader = EvalLoader(str(path), img_size=16, batch_size=4, options=options)
    for _ in loader:
        break
    (report,) = loader.take_reports()
    assert ([sample.key for sample in report.skipped], report.images) == (["bad"], 3)
    assert "1 samples were unusable" in caplog.text


def evaluate_together(path: str, cache: str, max_bad_fraction: float) -> str:
    """Read a rank's share; return what is told of all, or the error."""
    told = io.StringIO()
    logging.getLogger("vitfreeze").addHandler(logging.StreamHandler(told))
    ranks = join_ranks()
    options = ReadOptions(workers=0, cache_dir=cache, max_bad_fraction=max_bad_fraction)
    loader = EvalLoader(
        path, img_size=16, batch_size=4, rank=ranks.rank, world_size=ranks.world_size, options=options
    )  # fmt: skip
    for _ in loader:
        pass
    try:
        loader.tell_unusable(ranks)
    except ShardError as error:
        return str(error)
    return told.getvalue()


@pytest.mark.distributed
def test_ranks_that_evaluate_judge_bad_samples_together(tmp_path: Path) -> None:
    """The first rank tells what the second has met; one each is too much together only."""
    members = [("b0.jpg", b"?"), *good_members(0, 14), ("b1.jpg", b"?")]
    path = write_tar(tmp_path / "a.tar", members)
    first, second = run_ranks(evaluate_together, str(path), str(tmp_path), 2 / 16)
    assert "2 samples were unusable" in first
    assert "2 samples" not in second
    for told in run_ranks(evaluate_together, str(path), str(tmp_path), 0.1):
        assert "2 of 16 samples of epoch 0 are unusable, over data.max_bad_fraction=0.1" in told


def test_an_epoch_that_goes_on_in_other_micro_batches_is_reported_once(tmp_path: Path, make_loader: MakeLoader) -> None:
    path = write_tar(tmp_path / "a.tar", [("bad.jpg", b"?"), ("bad.cls", b"0"), *good_members(0, 15)])
    loader = make_loader(str(path), seed=1)
    first = [next(batches) for batches in [loader.batches(0, 4)] for _ in range(2)]
    assert loader.take_reports() == []
    rest = list(loader.batches(2, 4, micro_batch=2))
    (report,) = loader.take_reports()
    assert report.images == sum(len(batch.images) for batch in [*first, *rest]) == 16
    assert [sample.key for sample in report.skipped] == ["bad"]


def test_shard_without_a_usable_sample_is_refused(tmp_path: Path, make_loader: MakeLoader) -> None:
    members = [member for number in range(8) for member in ((f"b{number}.jpg", b"?"), (f"b{number}.cls", b"0"))]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ShardError, match=r"none of the 8 samples of shard .*a\.tar is usable") as error:
        read_epoch(make_loader(str(path), max_bad_fraction=1))
    message_of(error)


def test_odd_images_fall_back_to_pillow(tmp_path: Path, make_loader: MakeLoader) -> None:
    """A PNG and a WebP under a JPEG's name, CMYK, grey with alpha, and a palette all survive, counted."""
    members = good_members(0, 3)
    picture = Image.open(io.BytesIO(jpeg_of((200, 100, 50))))
    for number, (mode, kind) in enumerate(
        [("RGB", "PNG"), ("RGB", "WEBP"), ("CMYK", "JPEG"), ("LA", "PNG"), ("P", "PNG")], start=3
    ):
        data = io.BytesIO()
        picture.convert(mode).save(data, kind)
        members += [(f"s{number:03d}.jpg", data.getvalue()), (f"s{number:03d}.cls", b"0")]
    loader = make_loader(str(write_tar(tmp_path / "a.tar", members)))
    assert sorted(read_epoch(loader)) == [f"s{number:03d}" for number in range(8)]
    (report,) = loader.take_reports()
    assert (report.fallbacks, report.images, list(report.skipped)) == (5, 8, [])


# --------------------------------------------------------------------------------------------------- hostile ones


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_nothing_in_a_shard_runs_or_reaches_the_file_system(
    tmp_path: Path, make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "it-ran"
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb)
    assert trace.exists(), "the bomb itself must work, or this test proves nothing"
    trace.unlink()

    members = []
    for number in range(8):
        members += good_members(number, number + 1)
        members += [(f"s{number:03d}.{kind}", bomb) for kind in ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz")]
    for number, key in enumerate([f"{tmp_path}/planted", "../../planted", "a/../../planted", "./planted"], start=8):
        members += [(f"{key}.jpg", jpeg_of((50, 60, 200))), (f"{key}.cls", str(number).encode())]
    path = write_tar(tmp_path / "shards" / "a.tar", members)
    monkeypatch.chdir(tmp_path / "shards")
    before = {file for file in tmp_path.rglob("*") if "cache" not in file.parts}
    loader = make_loader(str(path))
    keys = read_epoch(loader)
    assert len(keys) == len(set(keys)) == 12
    assert {file for file in tmp_path.rglob("*") if "cache" not in file.parts} == before
    assert all(file.suffix == ".npz" for file in (tmp_path / "cache").rglob("*") if file.is_file())


def test_stored_index_that_was_tampered_with_is_read_anew(
    tmp_path: Path, make_loader: MakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "a.tar", good_members(0, 8))
    keys = read_epoch(make_loader(str(path)))
    (stored,) = (tmp_path / "cache" / "index").glob("*.npz")
    trace = tmp_path / "it-ran"
    for content in (pickle.dumps(Bomb(trace)), b"", stored.read_bytes()[:200]):
        stored.write_bytes(content)
        caplog.clear()
        assert read_epoch(make_loader(str(path))) == keys
        assert "is damaged" in caplog.text
    assert not trace.exists()


def test_links_and_devices_in_a_shard_are_not_followed(tmp_path: Path, make_loader: MakeLoader) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg_of((1, 2, 3)))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in good_members(0, 7):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for name, kind in (("z.jpg", tarfile.SYMTYPE), ("z.jpeg", tarfile.LNKTYPE), ("z.png", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, str(secret)
            archive.addfile(entry)
    loader = make_loader(str(path))
    assert loader.num_samples == 7
    assert "z" not in read_epoch(loader)


# ----------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"global_batch": 64, "micro_batch": 64}, "hold 20 samples.*fewer than one global batch of 64"),
        ({"crops_per_image": 3}, "micro-batch of 4 is not a multiple of crops_per_image=3"),
        ({"window_shards": 0}, "window_shards is 0"),
        ({"cache_gigabytes": 0.0}, "cache_gigabytes is 0.0, expected a number above 0"),
    ],
)
def test_settings_that_cannot_work(
    tmp_path: Path, make_loader: MakeLoader, settings: dict[str, object], words: str
) -> None:
    folder = write_shards(tmp_path / "shards", [12, 8])
    with pytest.raises(ValueError, match=words) as error:
        make_loader(folder, **settings)
    message_of(error)


def test_ranks_judge_bad_samples_together(tmp_path: Path, make_loader: MakeLoader) -> None:
    """One bad sample on a rank is too much for its share but not for the epoch; only the sum can tell."""
    members = [*good_members(0, 14), ("b0.jpg", b"?"), ("b0.cls", b"0"), ("b1.jpg", b"?"), ("b1.cls", b"0")]
    path = write_tar(tmp_path / "a.tar", members)
    reports = []
    for rank in range(4):
        loader = make_loader(str(path), rank=rank, world_size=4, micro_batch=1, max_bad_fraction=2 / 16)
        read_epoch(loader)
        reports += loader.take_reports()
    merged = merge_reports(reports, max_bad_fraction=2 / 16)
    assert (merged.images, merged.epoch_images) == (16, 16)
    assert sorted(sample.key for sample in merged.skipped) == ["b0", "b1"]
    with pytest.raises(ShardError, match=r"2 of 16 samples of epoch 0 are unusable, over data.max_bad_fraction=0\.1"):
        merge_reports(reports, max_bad_fraction=0.1)
