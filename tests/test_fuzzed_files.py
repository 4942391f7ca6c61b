"""Every file that is read, damaged at random and by intent: one sentence with its name, soon, or a plain result.

Anything but a ValueError or one of the packers' own errors fails here: a RecursionError, MemoryError, TypeError or
OSError of another's making would reach the user as a traceback.
"""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_shards import jpeg_of, open_loader, write_shards

from data_prep.errors import InputError, UndecodableError
from data_prep.images import prepare_image
from data_prep.manifest import read_manifest as read_pack_manifest
from vitfreeze.checkpoint.folder import open_checkpoint, write_manifest
from vitfreeze.config import load_config, load_run_config
from vitfreeze.data import ShardError
from vitfreeze.data.shards import ShardIndex, _read_index, _write_index, find_shards, index_shard
from vitfreeze.engine import read_settings
from vitfreeze.files import read_json_lines
from vitfreeze.planner.measured import read_step_times
from vitfreeze.planner.prediction import read_machine
from vitfreeze.pretrained import read_pretrained

SECONDS = 20.0  # for one file, on a busy machine
DEEP = 100_000
ROUNDS = 60


def damages(data: bytes, *, seed: int) -> Iterator[bytes]:
    """Yield a file with bytes flipped, cut, doubled, zeroed and exchanged."""
    dice = random.Random(seed)
    for _ in range(ROUNDS):
        changed = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 5, 20))):
            place, length = dice.randrange(len(changed) + 1), dice.choice((1, 2, 8, 64, 600))
            piece = dice.choice(
                (b"", bytes(length), dice.randbytes(length), bytes(changed[place : place + length]) * 2)
            )
            keep = dice.choice((0, length))
            changed[place : place + keep] = piece
        yield bytes(changed)


def read_all(read: Callable[[Path], object], path: Path, contents: Iterator[bytes] | list[bytes]) -> list[str]:
    """Let a reader read each content in the place of a file; return what it said of those that it refused."""
    said = []
    for content in contents:
        path.write_bytes(content)
        began = time.monotonic()
        try:
            read(path)
        except (ValueError, InputError) as error:
            message = str(error)
            assert "\n" not in message, message
            assert len(message) < 2000, message[:3000]
            said.append(message)
        assert time.monotonic() - began < SECONDS, f"{content[:200]!r} took too long"
    return said


def deep_json(kind: str = "[") -> bytes:
    return b'{"a": ' + (b"[" * DEEP if kind == "[" else b'{"a":' * DEEP)


ODD_JSON = [
    b"", b"\xff\xfe\x00", b"null", b"[]", b"7", b'"x"', deep_json(), deep_json("{"), b"9" * 5000,
    b'{"splits": {"train": 3}}', b'{"content": [], "sha256": 1}', b"{" * 10, b'{"step": 1e999}',
]  # fmt: skip


# -- recipes -----------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD_YAML = [
    "", "[]", "x", "7", "freeze: 3", "freeze: [", "freeze: {t_0: {a: b}}", "freeze: {? [a, b] : 1}",
    "run: {seed: !!int _}",
    "run: {seed: !!bool x}", "run: {seed: !!binary x}", "run: {seed: !!python/object:os.system x}", "\0", "\t: x",
    "run: {seed: 2026-99-99}", "run: {seed: 1" + "0" * 6000 + "}", "run: {seed: 1" + ":1" * 200_000 + "}",
    "freeze: {t_0: " + "[" * DEEP, "run: " + "{a: " * 3000, "data: {train: &a [*a]}", BOMB,
    "data:\n  train: " + BOMB.replace("\n", "\n  "), "x: " + "y" * (5 << 20), "run: {length: .nan epochs}",
    "run: {length: 1e999 epochs}", "optim: {blr: .inf}", "batch: {global_size: 1e15}", "base: [x]", "base: recipe.yaml",
    "freeze: {t_0: 0.5, t_0: 0.6}", "model: {depth: -1000000000000}", "data: {train: '" + "{0..9}" * 400 + "'}",
]  # fmt: skip


@pytest.mark.parametrize("read", [load_config, load_run_config])
def test_recipes(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "recipe.yaml"
    odd = [text.encode() for text in ODD_YAML]
    said = read_all(read, path, odd)
    assert len(said) > len(odd) // 2
    for message in read_all(read, path, [odd[5], odd[17], b"\xff\xff", odd[20], odd[22]]):
        assert "recipe.yaml" in message
    plain = b"base: paper\nmodel: {size: vit_tiny_test, img_size: 32}\nfreeze:\n  t_0: 0.3 # here\n"
    read_all(read, path, damages(plain, seed=1))


def test_a_long_chain_of_recipes_and_a_folder_for_a_recipe(tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    with pytest.raises(ValueError, match=r"0\.yaml has more than 20 recipes"):
        load_config(tmp_path / "0.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match=r"folder\.yaml"):
        load_config(tmp_path / "folder.yaml")


@pytest.mark.parametrize("value", ["[" * DEEP, "!!int _", "1" + ":1" * 100_000, "&a [*a]", "'", "{0..9}" * 300])
def test_overrides(value: str) -> None:
    with pytest.raises(ValueError, match=r"run\.seed") as error:
        load_config("paper", [f"run.seed={value}"])
    assert len(str(error.value)) < 2000


# -- JSON --------------------------------------------------------------------------------------------------------------


def read_info(path: Path) -> object:
    return find_shards(path.parent, split="train")


@pytest.mark.parametrize("name", ["_info.json", "sizes.json"])
def test_lists_of_shards(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, [3, 4])
    plain = (tmp_path / "_info.json").read_bytes()
    if name == "sizes.json":
        (tmp_path / "_info.json").unlink()
        plain = json.dumps({"tiny-train-0000.tar": 3, "tiny-train-0001.tar": 4}).encode()
    for message in read_all(read_info, tmp_path / name, [deep_json(), b"\xff", b"[]"]):
        assert name in message
    huge = [plain.replace(b"3", number) for number in (b"1" + b"0" * 12, b"1" + b"0" * 15, b"-1", b"1e999", b"1e15")]
    for message in read_all(read_info, tmp_path / name, huge):
        assert name in message
    read_all(read_info, tmp_path / name, [*ODD_JSON, *damages(plain, seed=2)])


def test_settings_of_deepspeed(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    config = load_config("paper", [f"run.ds_config={path}"])
    plain = json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "gradient_clipping": 0}).encode()
    for read in (read_settings, lambda path: read_machine(config, world_size=1)):
        odd = [b'{"zero_optimization": 3}', b'{"zero_optimization": {"stage": [1]}}', b'{"fp16": []}']
        assert all("zero.json" in message for message in read_all(read, path, [deep_json(), b"\xff", b"{"]))
        read_all(read, path, [*ODD_JSON, *odd, *damages(plain, seed=3)])


def test_measured_steps_and_manifests_of_packing(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    plain = json.dumps({"micro_batch": 4, "rows": [{"frozen_layers": n, "step_ms": 9 - n} for n in (0, 3)]}).encode()
    said = read_all(read_step_times, path, ODD_JSON)
    assert len(said) == len(ODD_JSON)
    assert all("steps.json" in message for message in said)
    read_all(read_step_times, path, damages(plain, seed=4))
    path = tmp_path / "manifest.json"
    said = read_all(lambda path: read_pack_manifest(path.parent), path, ODD_JSON)
    assert all("manifest.json" in message for message in said)


def test_logs_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for content in (*ODD_JSON, *damages(b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n', seed=5)):
        path.write_bytes(content)
        assert all(isinstance(line["step"], int) for line in read_json_lines(path))


def test_manifests_of_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    content = {
        "format_version": 1, "step": 4, "serial": 1, "world_size": 1, "scalars": {"frozen_layers": 0}, "extra": {},
        "files": {},
    }  # fmt: skip
    write_manifest(folder, content)
    path = folder / "manifest.json"
    assert open_checkpoint(folder).step == 4
    for name in content:  # with a checksum that fits
        write_manifest(folder, {key: value for key, value in content.items() if key != name})
        with pytest.raises(ValueError, match=r"manifest\.json"):
            open_checkpoint(folder)
    write_manifest(folder, content)
    plain = path.read_bytes()
    said = read_all(lambda path: open_checkpoint(path.parent), path, [*ODD_JSON, *damages(plain, seed=6)])
    assert all("manifest.json" in message for message in said)
    assert len(said) >= len(ODD_JSON)


# -- shards ------------------------------------------------------------------------------------------------------------


def tar_of(members: list[tuple[str, bytes]], *, form: int = tarfile.USTAR_FORMAT, **pax: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=form) as archive:
        for name, body in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = len(body), pax
            archive.addfile(entry, io.BytesIO(body))
    return data.getvalue()


def header(name: str, *, size: int, kind: bytes) -> bytes:
    """A tar header that announces so many bytes, in base 256 where octal digits do not do."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    block = bytearray(entry.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = (
        (b"%011o\0" % size) if 0 <= size < 8**11 else struct.pack(">Iq", 0xFFFFFFFF if size < 0 else 1 << 31, size)
    )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def read_shard(path: Path) -> ShardIndex:
    with path.open("rb") as file:
        index = index_shard(file, name=str(path))
    size = path.stat().st_size
    assert len(index) <= size // 512
    for place in range(len(index)):
        if place not in index.defects:
            assert 0 <= index.offsets[place] <= index.offsets[place] + index.sizes[place] <= size
    return index


GOOD = [
    (f"{number}.{extension}", body)
    for number in range(3)
    for extension, body in (("jpg", jpeg_of((9, 9, 200))), ("cls", b"1"))
]


@pytest.mark.parametrize("size", [10**12, 10**15, 2**62, -1, -512, -(2**62), 8**11 - 1])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, b"S"])
def test_headers_that_announce_impossible_sizes(tmp_path: Path, size: int, kind: bytes) -> None:
    plain = tar_of(GOOD)
    for content in (
        header("a.jpg", size=size, kind=kind) + plain,
        plain[:2048] + header("a.jpg", size=size, kind=kind) + plain,
    ):
        for message in read_all(read_shard, tmp_path / "a.tar", [content]):
            assert "a.tar" in message


PAX = [
    {"size": "1" + "0" * 15}, {"size": "-1"}, {"size": "-100000"}, {"size": "9" * 4000}, {"path": "x" * 3000},
    {"path": "../../x.jpg"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg", "GNU.sparse.realsize": "10"},
    {"GNU.sparse.map": "0,x,1", "GNU.sparse.size": "9"}, {"GNU.sparse.size": "x"}, {"mtime": "nan"}, {"uid": "1e999"},
    {"comment": "x" * (2 << 20)},
]  # fmt: skip


@pytest.mark.parametrize("pax", PAX, ids=[next(iter(pax)) for pax in PAX])
def test_pax_headers(tmp_path: Path, pax: dict[str, str]) -> None:
    data = tar_of(GOOD, form=tarfile.PAX_FORMAT, **pax)
    for message in read_all(read_shard, tmp_path / "a.tar", [data, *list(damages(data[:20_000], seed=8))[:30]]):
        assert "a.tar" in message


def test_a_long_chain_of_pax_headers(tmp_path: Path) -> None:
    body = b"12 comment=\n".ljust(512, b"\0")
    chain = (header("x", size=12, kind=tarfile.XHDTYPE) + body) * 3000
    path = tmp_path / "a.tar"
    read_all(read_shard, path, [chain + tar_of(GOOD), tar_of(GOOD)[:-10240] + chain + tar_of(GOOD)])


def test_damaged_shards(tmp_path: Path) -> None:
    for seed, form in ((9, tarfile.USTAR_FORMAT), (10, tarfile.PAX_FORMAT), (11, tarfile.GNU_FORMAT)):
        plain = tar_of([*GOOD, ("long/" * 40 + "name.jpg", b"x")], form=form)
        for message in read_all(read_shard, tmp_path / "a.tar", damages(plain, seed=seed)):
            assert "a.tar" in message


def test_damaged_shards_are_trained_on_or_refused(tmp_path: Path) -> None:
    plain = tar_of(
        [
            (f"{number}.{kind}", body)
            for number in range(12)
            for kind, body in (("jpg", jpeg_of((number, 99, 9))), ("cls", b"1"))
        ]
    )

    def train(path: Path) -> None:
        loader = open_loader(
            str(path), img_size=16, num_patches=4, global_batch=2, micro_batch=2, workers=0, max_bad_fraction=0.5,
            cache_dir=tmp_path / "cache",
        )  # fmt: skip
        for _ in loader.batches(0, loader.steps_per_epoch):
            pass

    for message in read_all(train, tmp_path / "a.tar", list(damages(plain, seed=12))[:60]):
        assert "a.tar" in message or "shards hold" in message


def test_stored_indices(tmp_path: Path) -> None:
    shard, path = tmp_path / "a.tar", tmp_path / "index.npz"
    shard.write_bytes(tar_of(GOOD))
    _write_index(read_shard(shard), path)
    plain = path.read_bytes()
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)})
    for content in (*damages(plain, seed=13), huge.getvalue(), b"", b"PK"):
        path.write_bytes(content)
        began, index = time.monotonic(), _read_index(path)
        assert index is None or len(index.keys) == len(index.offsets)
        assert time.monotonic() - began < SECONDS


# -- weights and images ------------------------------------------------------------------------------------------------


def test_weights(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_file({"blocks.0.norm1.weight": torch.ones(4)}, path, metadata={"origin": "here"})
    plain = path.read_bytes()
    text = b'{"a":' + b"[" * DEEP
    odd = [
        struct.pack("<Q", 10**15) + b"{}",
        struct.pack("<Q", 10**12),
        struct.pack("<Q", len(text)) + text,
        b"",
        b"\0",
    ]
    tensor = b'{"a":{"dtype":"F32","shape":[1000000000000000],"data_offsets":[0,4000000000000000]}}'
    odd.append(struct.pack("<Q", len(tensor)) + tensor)
    said = read_all(read_pretrained, path, [*odd, *damages(plain, seed=14)])
    assert all("encoder.safetensors" in message for message in said)
    for metadata in ({"model_size": "[" * DEEP}, {"model_size": "3"}, {"model_size": '{"x": 1}'}, {"colours": "[1]"}):
        save_file({"a": torch.ones(1)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"encoder\.safetensors"):
            read_pretrained(path)
    path = tmp_path / "encoder.pth"
    torch.save({"model": {"a": torch.ones(3)}}, path)
    said = read_all(read_pretrained, path, [b"", b"PK\x03\x04", *damages(path.read_bytes(), seed=15)])
    assert all("encoder.pth" in message for message in said)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_images(form: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (20, 30), (9, 99, 199)).save(data, form)
    for content in damages(data.getvalue(), seed=16):
        with suppress(UndecodableError):
            prepare_image(content)


def test_a_shard_that_is_not_there_for_the_system() -> None:
    with pytest.raises(ShardError, match="names no shard"):
        find_shards("\0", split="train")
