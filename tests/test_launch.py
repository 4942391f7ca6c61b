"""The launch scripts: clean shell, no hyperparameters, and one sentence for what cannot work. No processes of a run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nodes import LAUNCH, ROOT, require_environment

from vitfreeze.config import Config, settings

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
HOSTS = "node-a slots=8\n# a comment\nnode-b slots=8\n"


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text(HOSTS)
    return path


def run_script(name: str, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VITFREEZE_VENV": sys.prefix, "PATH": path or os.environ["PATH"]}
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_is_clean(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("THE SHELL IS NOT LINTED: there is no shellcheck")
    lint = ["shellcheck", "--shell=bash", "-x", "--source-path", str(ROOT), str(script)]
    result = subprocess.run(lint, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_the_container_is_clean() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("THE DOCKERFILE IS NOT LINTED: there is no hadolint")
    result = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_launcher_sets_no_setting(script: Path) -> None:
    names = {name for name, _, _ in settings(Config())}
    found = set(re.findall(r"\b([a-z]+\.[a-z_0-9]+)=", script.read_text())) & names
    assert not found, f"{script.name} sets {found}; that is the recipe's"


def test_the_examples_are_what_deepspeed_reads(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(LAUNCH / "hostfile.example"))) == {f"node-{name}": 8 for name in "abcd"}
    kept = [
        line for line in (LAUNCH / "deepspeed_env.example").read_text().splitlines() if re.match(r"[A-Za-z_]\w*=", line)
    ]
    assert [line.partition("=")[0] for line in kept] == ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"]


@pytest.mark.parametrize("name", ["local.sh", "multinode.sh", "torchrun.sh"])
def test_no_command_gives_the_usage(name: str) -> None:
    result = run_script(name)
    assert result.returncode == 2
    assert f"bash launch/{name}" in result.stderr


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, [], "no readable hostfile"),
        ("node-a 8\n", [], "line 1 is 'node-a 8 '; a line is 'NAME slots=GPUS'"),
        ("node-a slots=0\n", [], "slots=0"),
        ("node-a slots=8\nnode-a slots=8\n", [], "names 'node-a' for the second time"),
        (HOSTS, ["--exclude", "node-x"], "--exclude names node-x"),
        (HOSTS, ["--exclude", "node-a@node-b"], "no host is left"),
        (HOSTS, ["--node_rank", "2", "--master_addr", "node-a"], "the nodes of"),
        (HOSTS, ["--node_rank", "x", "--master_addr", "node-a"], "--node_rank is 'x'"),
        (HOSTS, ["--node_rank", "0"], "--node_rank needs --master_addr"),
        (HOSTS, ["--nodes", "3"], "there is no option --nodes"),
        (HOSTS, ["--exclude"], "--exclude needs a value"),
    ],
)
def test_bad_input_gets_one_sentence(content: str | None, options: list[str], words: str, tmp_path: Path) -> None:
    require_environment()
    path = tmp_path / "hosts"
    if content is not None:
        path.write_text(content)
    arguments = options if options == ["--exclude"] else [*options, "pretrain", "x"]
    result = run_script("multinode.sh", "--hostfile", str(path), *arguments)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_pdsh_it_says_what_to_do(hostfile: Path) -> None:
    require_environment()
    if shutil.which("pdsh"):
        pytest.skip("THE REFUSAL WITHOUT pdsh IS NOT TESTED: pdsh is installed")
    result = run_script("multinode.sh", "--hostfile", str(hostfile), "pretrain", "x")
    assert result.returncode == 2
    assert "pdsh is not installed; install it, or start every node with --node_rank" in result.stderr


def test_a_dead_host_is_named_before_anything_starts(tmp_path: Path) -> None:
    require_environment()
    if not (shutil.which("pdsh") and shutil.which("ssh")):
        pytest.skip("A DEAD HOST OVER SSH IS NOT TESTED: it takes pdsh and ssh")
    path = tmp_path / "hosts"
    path.write_text("no-such-host.invalid slots=8\n")
    result = run_script("multinode.sh", "--hostfile", str(path), "pretrain", "x")
    assert result.returncode == 2
    assert "host no-such-host.invalid does not answer ssh" in result.stderr
    assert "--exclude no-such-host.invalid" in result.stderr


PYTHON = """#!/bin/bash
echo "$@" >>"$(dirname "$0")/calls"
[[ $1 != -m || $3 != "${FAILING:-}" ]] || exit 1
"""


def install(venv: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Install into an environment whose python only notes what it is asked for; return the outcome and the notes."""
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (venv / "bin" / "calls").unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    done = subprocess.run(
        ["bash", "-euc", f'source "{LAUNCH}/environment.sh"; install_environment'],
        capture_output=True, text=True, check=False,
        env={**kept, "VITFREEZE_VENV": str(venv), "PYTHON": sys.executable, **variables},
    )  # fmt: skip
    calls = venv / "bin" / "calls"
    return done, calls.read_text() if calls.exists() else ""


def test_another_torch_can_be_installed(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("THE CHOICE OF TORCH IS NOT TESTED: there is no g++")
    venv, pins = tmp_path / "venv", (ROOT / "constraints.txt").read_text().splitlines()
    assert f"--constraint {ROOT}/constraints.txt" in install(venv)[1]
    assert install(venv)[1] == "", "what is installed is not installed again"
    done, calls = install(venv, TORCH_VERSION="2.11.0")
    assert done.returncode == 0, done.stderr
    assert f"--constraint {venv}/constraints.txt --editable {ROOT}[test]" in calls
    chosen = (venv / "constraints.txt").read_text().splitlines()
    assert set(chosen) - set(pins) == {"torch==2.11.0"}
    assert {pin.partition("==")[0] for pin in set(pins) - set(chosen)} == {"torch", "torchvision", "setuptools"}
    assert install(venv, TORCH_VERSION="2.11.0")[1] == ""
    calls = install(venv, TORCH_VERSION="2.11.0", TORCH_INDEX_URL="https://example.invalid/cu126")[1]
    assert f"--extra-index-url https://example.invalid/cu126 --constraint {venv}/constraints.txt torch" in calls
    assert f"--constraint {ROOT}/constraints.txt" in install(venv)[1], "back to the pinned one"


def test_a_torch_that_there_is_not_gets_one_sentence(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("THE CHOICE OF TORCH IS NOT TESTED: there is no g++")
    done, _ = install(tmp_path / "venv", TORCH_VERSION="1.0", FAILING="--disable-pip-version-check")
    assert done.returncode == 2
    assert "cannot be installed with TORCH_VERSION=1.0: see what pip says above" in done.stderr
    assert not (tmp_path / "venv" / "installed").exists()


PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: {handler})
print("ready", flush=True)
time.sleep(60)
"""


def start_forwarding(handler: str) -> subprocess.Popen[str]:
    """Start a program that handles SIGUSR1 as a training process does, under the function that the launchers share."""
    script = f'source "{LAUNCH}/environment.sh"; export PATH="{Path(sys.executable).parent}:$PATH"; ' + (
        'run_and_forward_signals python -c "$0" || exit $?'
    )
    process = subprocess.Popen(
        ["bash", "-euc", script, PROGRAM.format(handler=handler)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_arrives_as_a_request_to_save(number: signal.Signals) -> None:
    process = start_forwarding("sys.exit(75)")
    process.send_signal(number)
    assert process.wait(20) == 75


def test_a_second_interrupt_ends_at_once() -> None:
    process = start_forwarding("print('saving', flush=True)")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(("visible", "ranks"), [("3", "1"), ("0,2,5", "3")])
def test_visible_devices_are_counted(visible: str, ranks: str) -> None:
    result = subprocess.run(
        ["bash", "-euc", f'source "{LAUNCH}/environment.sh"; count_ranks'], capture_output=True, text=True, check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": visible},
    )  # fmt: skip
    assert result.stdout.strip() == ranks
