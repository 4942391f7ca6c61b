"""What people see: help, misspelt words, and what reaches a terminal and a file."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from processes import run_command, without_launcher
from test_pretrain import ROOT, SMALL

from data_prep.__main__ import main as prepare
from vitfreeze import cli
from vitfreeze.evaluate import EvaluationData, evaluate_knn
from vitfreeze.pretrained import read_pretrained
from vitfreeze.terminal import wants_colour
from vitfreeze.threads import count_threads, limit_threads


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def test_vitfreeze_alone_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    listed = capsys.readouterr().out
    assert all(f"\n    {name} " in listed for name in ("pretrain", "plan", "features", "doctor"))


@pytest.mark.parametrize("words", ["config demo", "bench step demo"])
@pytest.mark.parametrize(("flag", "verbosity"), [("-q", -1), ("--quiet", -1), ("-v", 1), ("", 0)])
def test_how_much_is_heard_may_be_said_before_and_behind_the_command(words: str, flag: str, verbosity: int) -> None:
    for line in (f"{flag} {words}", f"{words} {flag}"):
        assert cli.parse_arguments(line.split()).verbosity == verbosity


PARTS = ("data", "step", "stages", "freeze", "launches", "scaling", "gpu")


@pytest.mark.parametrize("command", [f"bench {name}" if name in PARTS else name for name in cli.EXAMPLES])
def test_help_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*command.split(), "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    example = shown.partition("example: vitfreeze ")[2]
    assert example.startswith(command)
    cli.parse_arguments(example.split())
    if command in ("pretrain", "finetune", "config", "plan", "doctor", "bench step"):
        assert "[section.key=value ...]" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrian", "paper"], "did you mean pretrain?"),
        (["config", "papr"], "did you mean paper?"),
        (["config", "paper", "freeze.t0=0.5"], "did you mean 'freeze.t_0'?"),
        (["knn", "runs/tinny"], "did you mean 'runs/tiny'?"),
        (["config", "runs/tinny.yaml"], "did you mean 'runs/tiny.yaml'?"),
        (["bench", "stp"], "did you mean step?"),
        (["knn", "runs/tiny", "--kk", "5"], "vitfreeze knn: error: unrecognized arguments: --kk; did you mean --k?"),
        (["features", "runs/tiny", "tree.jpg", "--ouput", "x.npz"], "--ouput; did you mean --out?"),
        (["pretrain", "demo", "data.train=x", "--frsh"], "--frsh; did you mean --fresh?"),
        (["bench", "step", "demo", "--round=2"], "--round; did you mean --rounds?"),
        (["--qiet", "config", "demo"], "--qiet; did you mean --quiet?"),
        (["plot", "runs/tinny"], "did you mean 'runs/tiny'?"),
        (["report", "runs/tinny"], "did you mean 'runs/tiny'?"),
        (["features", "timm:vit_tny_patch16_224", "tree.jpg", "-o", "x.npz"], "did you mean 'vit_tiny_patch16_224'?"),
        (["features", "runs/tiny", "tre.jpg", "-o", "x.npz"], "did you mean 'tree.jpg'?"),
        (["features", "runs/tiny", "shard", "-o", "x.npz"], "did you mean 'shards'?"),
        (["pretrain", "demo", "data.train=shard/photo"], "did you mean 'shards/photos'?"),
        (
            ["pretrain", "demo", "data.train=shards/photos/trian-{0..3}.tar"],
            "did you mean 'shards/photos/train-0.tar'?",
        ),
        (["bench", "data", "shards/photoz"], "did you mean 'shards/photos'?"),
    ],
)
def test_misspelt_words_are_met_with_the_nearest(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "shards" / "photos").mkdir(parents=True)
    for name in ("runs/tiny.yaml", "tree.jpg", "shards/photos/train-0.tar"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["foldr", "photos", "--out", "x"], "did you mean folder?"),
        (["folder", "photoz", "--out", "x"], "there is no photoz; did you mean photos?"),
        (["verify", "photo"], "there is no photo; did you mean photos?"),
        (["folder", "photos", "--ot", "x"], "vitfreeze-data folder: error: unrecognized arguments: --ot; did you mean"),
        (["folder", "photos", "--out", "x", "--worker", "2"], "--worker; did you mean --workers?"),
        (["imagenet", "--train", "elsewhere.tar", "--out", "x"], "there is no elsewhere.tar."),
    ],
)
def test_the_packer_meets_misspelt_words_too(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with suppress(SystemExit):
        assert prepare(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(["plan", "paper", "--node", "2"], "--node"), (["linear", "runs/tiny", "--warm", "1"], "--warm")],
)
def test_options_have_no_short_forms(arguments: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert f"unrecognized arguments: {flag}; did you mean {flag}" in capsys.readouterr().err


def test_values_that_look_like_options_are_none() -> None:
    parse = cli.parse_arguments
    assert parse(["features", "w", "a.jpg", "-of.npz"]).out == "f.npz"
    assert parse(["plan", "paper", "--tflops", "-1.5", "batch.global_size=16"]).tflops == -1.5
    assert parse(["pretrain", "paper", "--fresh", "batch.global_size=16"]).overrides == ["batch.global_size=16"]
    assert parse(["features", "w", "-o", "f.npz", "--", "--k.jpg"]).images == ["--k.jpg"]
    assert parse(["--local_rank=0", "knn", "w", "--k", "3"]).k == [3]


def test_neighbours_are_counted_before_features(demo_shards: Path, tmp_path: Path) -> None:
    data = EvaluationData(train=(str(demo_shards),), val=(str(demo_shards),), workers=0)
    with pytest.raises(ValueError, match="--k is 0, expected numbers of at least 1"):
        evaluate_knn("nowhere", data, k=(0,))


class Danger:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def test_a_refused_pickle_is_named_and_nobody_advised_to_trust_it(tmp_path: Path) -> None:
    torch.save({"model": Danger()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"posix\.system|os\.system") as refused:
        read_pretrained(tmp_path / "x.pth")
    assert "weights_only" not in str(refused.value)


def run(arguments: list[str]) -> str:
    """Run vitfreeze with its stderr and stdout in a file; return what came there."""
    command = [sys.executable, "-m", "vitfreeze", *arguments]
    done = subprocess.run(
        command, env=alone(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=280
    )
    shown = done.stdout.decode()
    assert done.returncode == 0, shown
    return shown


def run_on_terminal(arguments: list[str], *, program: str = "vitfreeze") -> str:
    """Run a program with its stderr on a terminal of 120 columns; return what came there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "-m", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=alone()) as process:
        os.close(theirs)
        seen = b""
        try:
            while part := os.read(ours, 4096):
                seen += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, seen.decode()
    return seen.decode()


def alone() -> dict[str, str]:
    """Return the environment of a process that no launcher started."""
    return without_launcher() | {"PYTHONPATH": str(ROOT)}


def training(shards: Path, run_dir: Path, *options: str) -> list[str]:
    settings = [
        f"data.train={shards}",
        "data.val=[]",
        *SMALL,
        "freeze.mode=off",
        "run.length=12 steps",
        "checkpoint.every=12 steps",
        "run.show_every=12 steps",
    ]
    return ["pretrain", "demo", *settings, f"run.dir={run_dir}", *options]


@pytest.fixture(scope="module")
def finished(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small run, and what it said into a file."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    return run_dir, run(training(demo_shards, run_dir))


def test_a_terminal_gets_a_bar_and_nothing_of_other_packages(demo_shards: Path, tmp_path: Path) -> None:
    shown = run_on_terminal(training(demo_shards, tmp_path / "run"))
    assert re.search(r"\rpre-training: .*12/12", shown)
    assert "DeepSpeed" not in shown
    assert "a new run in" in shown


def test_a_file_gets_lines_with_their_time(finished: tuple[Path, str]) -> None:
    _, shown = finished
    assert "\r" not in shown
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step 12 of 12: loss ", shown, flags=re.MULTILINE)
    ours = [line for line in shown.splitlines() if "a new run in" in line or re.search(r"step \d+ of 12", line)]
    assert len(ours) >= 2
    assert [line for line in ours if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)] == []


def test_a_run_keeps_its_log(finished: tuple[Path, str]) -> None:
    run_dir, shown = finished
    log = (run_dir / "run.log").read_text()
    assert " INFO vitfreeze: a new run in" in log
    assert "DeepSpeed" not in shown


def test_packing_draws_a_bar_on_a_terminal_and_writes_dated_lines_elsewhere(tmp_path: Path) -> None:
    arguments = ["demo", "--samples", "60", "--out", str(tmp_path / "shards")]
    command = [sys.executable, "-m", "data_prep", *arguments]
    shown = subprocess.run(command, env=alone(), capture_output=True, check=True).stderr.decode()
    assert "\r" not in shown
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO packing: 60 of 60 img, .* MB/s\n", shown)
    shown = run_on_terminal(["verify", str(tmp_path / "shards")], program="data_prep")
    assert re.search(r"\rverifying: .*60/60", shown)
    assert "INFO" not in shown


SPEAKERS = """
import logging, os, sys, warnings
from pathlib import Path
from vitfreeze.terminal import log_into, set_up_logging
set_up_logging(int(sys.argv[2]))
theirs = logging.getLogger("DeepSpeed")
theirs.addHandler(logging.StreamHandler(sys.stdout))
theirs.propagate = False
with log_into(Path(sys.argv[1]), rank=int(os.environ["RANK"])):
    logging.getLogger("vitfreeze").info("our news")
    logging.getLogger("vitfreeze.engine").error("our error")
    theirs.warning("their worry")
    logging.getLogger("torch").error("their error")
    warnings.warn("python worry")
    print("their print")
    os.write(1, b"their c\\n")
print("a result")
"""
FROM_OTHERS = {"their worry", "python worry", "their print", "their c"}


@pytest.mark.parametrize(
    ("rank", "verbosity", "heard"),
    [
        (0, 0, {"our news", "our error", "their error", "a result"}),
        (0, -1, {"our error", "their error", "a result"}),
        (0, 1, {"our news", "our error", "their error", "a result"} | FROM_OTHERS),
        (1, 0, {"our error", "their error", "a result"}),
    ],
)
def test_who_is_heard_where(rank: int, verbosity: int, heard: set[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", SPEAKERS, str(tmp_path / "run.log"), str(verbosity)]
    done = subprocess.run(
        command, env=alone() | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
    )
    shown, said = done.stdout.decode(), {"our news", "our error", "their error", "a result"} | FROM_OTHERS
    assert {words for words in said if words in shown} == heard
    if rank == 0:
        log = (tmp_path / "run.log").read_text()
        printed = {"their print", "their c"} if verbosity > 0 else set()  # they stay where they were
        news = {"our news"} if verbosity < 0 else set()
        assert {words for words in said if words in log} == said - {"a result"} - printed - news
    else:
        assert not (tmp_path / "run.log").exists()


def test_more_neighbours_than_images_are_refused_before_features(finished: tuple[Path, str], demo_shards: Path) -> None:
    run_dir, _ = finished
    where = ["--train", str(demo_shards), "--val", str(demo_shards), "--workers", "0"]
    done = run_command("knn", str(run_dir), *where, "--k", "10", "1000000")
    assert done.returncode == 2
    assert "--k is 1000000, expected at most the 100 training images that vote" in done.stderr
    assert "features of" not in done.stdout + done.stderr


def test_threads_are_shared_by_the_ranks_of_a_machine() -> None:
    assert count_threads({}, cores=16) == 16
    assert count_threads({"LOCAL_SIZE": "8"}, cores=16) == 2
    assert count_threads({"LOCAL_WORLD_SIZE": "32"}, cores=16) == 1


@pytest.mark.parametrize("given", ["", "3"])
def test_a_command_sets_its_threads_unless_they_are_set(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setenv("LOCAL_SIZE", "1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == (given or str(len(os.sched_getaffinity(0))))


def test_colour_is_for_terminals_of_those_who_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour()
