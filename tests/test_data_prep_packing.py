"""Packing is reproducible, resumable and never leaves half a shard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.catalogue import clean_key, number_repeated
from data_prep.workers import run_tasks

ROOT = Path(__file__).resolve().parents[1]
DEMO = ["demo", "--samples", "960", "--size", "32", "--samples-per-shard", "24"]
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from data_prep.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restore_interrupt,
    )


def restore_interrupt() -> None:
    """A shell that runs the tests in the background may have switched Ctrl-C off for its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def members_of_session(session: int) -> list[int]:
    """Processes that are still there, without zombies."""
    alive = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            alive.append(int(folder.name))
    return alive


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("reference") / "demo"
    assert main([*DEMO, "--out", str(out)]) == 0
    return out


@pytest.mark.distributed
def test_workers_do_not_change_a_byte(reference: Path, tmp_path: Path) -> None:
    assert main([*DEMO, "--out", str(tmp_path / "out"), "--workers", "3"]) == 0
    assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.distributed
@pytest.mark.parametrize(("workers", "signal_number"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_a_stopped_run_goes_on(reference: Path, tmp_path: Path, workers: int, signal_number: int) -> None:
    out = tmp_path / "out"
    command = [*DEMO, "--out", str(out), "--workers", str(workers)]
    process = start(["-m", "data_prep", *command])
    journal = out / "packing.jsonl"  # its settings, then a line for every finished shard
    wait_until(lambda: journal.is_file() and journal.read_text().count("\n") >= 4)
    process.send_signal(signal_number)
    _, errors = process.communicate()
    wait_until(lambda: not members_of_session(process.pid))
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert not list(out.glob(".*.partial"))
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(finished) < 40
    assert not (out / "manifest.json").exists()
    assert main([*command[:-1], "1"]) == 0
    assert contents(out) == contents(reference)
    kept = sum(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert kept >= 3  # all but what was finished and not yet in the journal


@pytest.mark.distributed
def test_ctrl_c_while_the_workers_start_is_one_sentence(reference: Path, tmp_path: Path) -> None:
    """A terminal sends it to the whole group: to the fork server in its imports, and while a worker is half made."""
    out = tmp_path / "out"
    command = [*DEMO, "--out", str(out), "--workers", "2"]
    process = start(["-m", "data_prep", *command])
    wait_until((out / "packing.jsonl").is_file)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.endswith("stopped; the same command goes on from here\n")
    wait_until(lambda: not members_of_session(process.pid))
    assert main([*command[:-1], "1"]) == 0
    assert contents(out) == contents(reference)


def test_a_torn_line_in_the_journal_costs_one_shard(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    manifest = json.loads((reference / "manifest.json").read_text())
    for entry in manifest["shards"][:3]:
        (out / entry["name"]).write_bytes((reference / entry["name"]).read_bytes())
    lines = [json.dumps(line) for line in ({"format": 1, "settings": manifest["settings"]}, *manifest["shards"][:3])]
    (out / "packing.jsonl").write_text("\n".join(lines)[:-10])
    (out / ".demo-train-0005.tar.1.partial").write_bytes(b"half")
    assert main([*DEMO, "--out", str(out)]) == 0
    assert "2 of 40 shards were there already" in capsys.readouterr().out
    assert contents(out) == contents(reference)


def test_second_run_only_checks(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(reference)
    times = {path: path.stat().st_mtime_ns for path in reference.glob("*.tar")}
    assert main([*DEMO, "--out", str(reference)]) == 0
    assert "40 of 40 shards were there already" in capsys.readouterr().out
    assert contents(reference) == before
    assert {path: path.stat().st_mtime_ns for path in reference.glob("*.tar")} == times


def test_second_run_mends_what_was_damaged(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, data in contents(reference).items():
        (out / name).write_bytes(data)
    (out / "demo-train-0003.tar").unlink()
    with open(out / "demo-train-0004.tar", "r+b") as file:
        file.seek(3000)
        file.write(b"\xff" * 100)
    assert main([*DEMO, "--out", str(out)]) == 0
    assert contents(out) == contents(reference)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", "1"], "seed = 0 (now 1)"),
        (["--samples", "500"], "other images"),
        (["--samples-per-shard", "10"], "samples_per_shard"),
        (["--name", "other"], "dataset = demo"),
    ],
)
def test_other_settings_are_refused(
    reference: Path, capsys: pytest.CaptureFixture[str], change: list[str], words: str
) -> None:
    before = contents(reference)
    assert main([*DEMO, "--out", str(reference), *change]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert contents(reference) == before


def test_foreign_shards_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos.tar").write_bytes(b"mine")
    assert main([*DEMO, "--out", str(tmp_path)]) == 2
    assert "photos.tar" in capsys.readouterr().err
    assert contents(tmp_path) == {"photos.tar": b"mine"}


@pytest.mark.distributed
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_failed_write_leaves_whole_shards_only(reference: Path, tmp_path: Path, workers: str) -> None:
    """A limit on the size of files makes the system refuse a write, as a full disk does."""
    command = ["demo", "--samples", "480", "--size", "32", "--samples-per-shard", "64", "--workers", workers]
    out = tmp_path / "out"
    process = start(["-c", LIMITED, "100000", *command, "--out", str(out)])
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert [line for line in errors.splitlines() if line.startswith("error: cannot write")]
    assert "File too large" in errors
    assert not list(out.glob("*.tar"))
    assert not list(out.glob(".*.partial"))
    wait_until(lambda: not members_of_session(process.pid), seconds=10)
    assert main([*command[:-1], "1", "--out", str(out)]) == 0
    assert main(["verify", str(out), "--workers", "1"]) == 0


def test_a_journal_that_cannot_be_written(reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(["-c", LIMITED, "300", *DEMO, "--out", str(out)])
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert f"error: cannot write {out / 'packing.jsonl'}" in errors
    assert main([*DEMO, "--out", str(out)]) == 0
    assert contents(out) == contents(reference)


def test_two_runs_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    with open(tmp_path / "packing.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main([*DEMO, "--out", str(tmp_path)]) == 2
    assert "another process" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.tar"))


def test_unreadable_settings_are_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--samples-per-shard", "0"], ["--seed", "-1"], ["--workers", "0"], ["--name", "a/b"]):
        assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
        assert options[0] in capsys.readouterr().err
    for options in (["--quality", "90"], ["--resize-shorter", "0"], ["--resize-shorter", "64", "--quality", "0"]):
        assert main(["folder", str(tmp_path / "missing"), "--out", str(tmp_path / "out"), *options]) == 2
        assert options[-2] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def die(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.mark.distributed
def test_a_killed_worker_is_told() -> None:
    from data_prep.errors import OutputError

    with pytest.raises(OutputError, match="killed from outside"):
        list(run_tasks(die, range(4), workers=2))


def test_keys_are_safe_in_every_reader() -> None:
    assert clean_key("a.b c/d") == b"a_b_c_d"
    assert clean_key("__meta__") == b"meta__"
    assert clean_key("...") == b"image"
    long = {clean_key("x" * 200 + letter) for letter in "ab"}
    assert len(long) == 2
    assert {len(key) for key in long} == {80}


def test_repeated_keys_are_numbered() -> None:
    assert number_repeated([b"a", b"b", b"a", b"a-2", b"a"]) == [b"a", b"b", b"a-3", b"a-2", b"a-4"]


def test_two_packs_of_the_same_input_differ_in_no_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where images are left out: the reason that Pillow gives holds the address of an object."""
    tree = tmp_path / "tree"
    for number in range(6):
        folder = tree / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 10, 10)).save(folder / f"{number}.jpg")
        (folder / f"bad{number}.jpg").write_bytes(b"no image at all")
    packs = []
    for name in ("a", "b"):
        # Another process has other addresses.
        command = ["-m", "data_prep", "folder", str(tree / "train"), "--out", str(tmp_path / name), "--workers", "2"]
        process = start(command)
        said = "".join(process.communicate())
        assert process.returncode == 0, said
        packs.append(contents(tmp_path / name))
    assert packs[0] == packs[1]
    assert len(packs[0]["skipped.jsonl"].splitlines()) == 6
    assert b" at 0x" not in b"".join(packs[0].values())
