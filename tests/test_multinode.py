"""Several nodes: the launch scripts with DeepSpeed's launcher as on a cluster, each node a process tree of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from jobs import read_losses
from nodes import ROOT, Script, descendants, require_environment, wait_until, write_recipe
from processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]
NOTHING: Mapping[int, Any] = MappingProxyType({})


class Cluster:
    """Nodes named a, b, c, ... of one process each; what they start is added to `scripts`."""

    def __init__(self, folder: Path, nodes: int, scripts: list[Script]) -> None:
        self.folder = folder
        self.scripts = scripts
        self.names = [chr(ord("a") + node) for node in range(nodes)]
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in self.names))

    def start(
        self,
        *command: str,
        exclude: Sequence[str] = (),
        only: Sequence[int] = (),
        extra: Mapping[int, Sequence[str]] = NOTHING,
        variables: Mapping[int, Mapping[str, str]] = NOTHING,
        before: Mapping[int, Sequence[str]] = NOTHING,
        address: str = "127.0.0.1",
    ) -> list[Script]:
        """Start a command on every node that is left, as a scheduler does."""
        count, port, scripts = len(self.names) - len(exclude), free_port(), []
        options = ["--exclude", "@".join(exclude)] if exclude else []
        for node in only or range(count):
            scripts.append(
                Script(
                    "multinode.sh",
                    "--hostfile",
                    str(self.hostfile),
                    *options,
                    "--node_rank",
                    str(node),
                    "--master_addr",
                    address,
                    "--master_port",
                    str(port),
                    *command,
                    *extra.get(node, ()),
                    log=self.folder / f"node{node}.log",
                    variables=variables.get(node),
                    before=before.get(node, ()),
                )
            )
        self.scripts += scripts
        return scripts


@pytest.fixture
def scripts() -> Iterator[list[Script]]:
    """What was started; ended with the test, however it ends."""
    started: list[Script] = []
    yield started
    for script in started:
        if script.process.poll() is None:
            script.lose()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    require_environment()
    return write_recipe(tmp_path)


def newest_step(run: Path) -> int:
    pointer = run / "checkpoints/newest"
    return int(pointer.read_text().strip().rpartition("-")[2]) if pointer.is_file() else 0


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def undisturbed_losses(recipe: Path, folder: Path, scripts: list[Script]) -> dict[int, float]:
    """Return the loss of every step of the same run in one process."""
    (alone,) = Cluster(folder, 1, scripts).start("pretrain", str(recipe), f"run.dir={folder / 'alone'}")
    assert alone.wait() == 0, alone.text()
    return {step: line["loss"] for step, line in read_losses(folder / "alone").items()}


def test_two_nodes_take_the_same_steps_as_one(recipe: Path, tmp_path: Path, scripts: list[Script]) -> None:
    nodes = Cluster(tmp_path, 2, scripts).start("pretrain", str(recipe), f"run.dir={tmp_path / 'run'}")
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text()
    losses = {step: line["loss"] for step, line in read_losses(tmp_path / "run").items()}
    assert losses == pytest.approx(undisturbed_losses(recipe, tmp_path, scripts), rel=1e-5)
    assert len(losses) == 24


def test_a_node_is_lost_and_the_rest_goes_on_with_the_same_samples(
    recipe: Path, tmp_path: Path, scripts: list[Script]
) -> None:
    cluster, run = Cluster(tmp_path, 4, scripts), tmp_path / "run"
    nodes = cluster.start("pretrain", str(recipe), f"run.dir={run}")
    wait_until(lambda: newest_step(run) >= 8, what="the second checkpoint")
    nodes[2].lose()
    assert all(node.wait() != 0 for node in nodes), "no node takes it for success"
    kept = newest_step(run)
    assert 8 <= kept < 24
    nodes = cluster.start("pretrain", str(recipe), f"run.dir={run}", exclude=["c"])  # 24 images divide by 3 ranks too
    assert [node.wait() for node in nodes] == [0, 0, 0], nodes[0].text()
    losses = {step: line["loss"] for step, line in read_losses(run).items()}
    assert losses == pytest.approx(undisturbed_losses(recipe, tmp_path, scripts), rel=1e-5)


def test_a_stopped_run_says_75_on_every_node_and_goes_on_on_half_of_them(
    recipe: Path, tmp_path: Path, scripts: list[Script]
) -> None:
    cluster, run = Cluster(tmp_path, 2, scripts), tmp_path / "run"
    nodes = cluster.start("pretrain", str(recipe), f"run.dir={run}")
    wait_until(lambda: newest_step(run) >= 4, what="the first checkpoint")
    nodes[1].interrupt()
    assert [node.wait() for node in nodes] == [75, 75], nodes[0].text()
    assert 4 <= newest_step(run) < 24
    (node,) = cluster.start("pretrain", str(recipe), f"run.dir={run}", exclude=["a"])
    assert node.wait() == 0, node.text()
    losses = {step: line["loss"] for step, line in read_losses(run).items()}
    assert losses == pytest.approx(undisturbed_losses(recipe, tmp_path, scripts), rel=1e-5)


def test_ranks_that_do_not_mean_the_same_run_do_not_start(recipe: Path, tmp_path: Path, scripts: list[Script]) -> None:
    cluster, run = Cluster(tmp_path, 2, scripts), f"run.dir={tmp_path / 'run'}"
    other_code = tmp_path / "other"
    shutil.copytree(ROOT / "vitfreeze", other_code / "vitfreeze", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "ds_configs", other_code / "ds_configs")
    with (other_code / "vitfreeze/model/hog.py").open("a") as file:
        file.write("# patched on one node\n")
    cases = {
        "freeze.t_0 is 0.3 on rank 0": {"extra": {1: ["freeze.t_0=0.4"]}},
        "rank 1 (": {"extra": {1: ["data.train=/nowhere"]}},
        "the version of vitfreeze is": {"variables": {1: {"PYTHONPATH": str(other_code)}}},
    }
    for words, difference in cases.items():
        nodes = cluster.start("pretrain", str(recipe), run, **difference)
        assert [node.wait() for node in nodes] == [2, 2], nodes[0].text()
        assert words in nodes[0].text()
        assert newest_step(tmp_path / "run") == 0


def test_a_node_that_never_comes_is_named(recipe: Path, tmp_path: Path, scripts: list[Script]) -> None:
    (node,) = Cluster(tmp_path, 2, scripts).start(
        "pretrain", str(recipe), f"run.dir={tmp_path / 'run'}", only=[0], variables={0: {"DEEPSPEED_TIMEOUT": "1"}}
    )
    assert node.wait() == 2
    assert "rank 1 of 2 (node 1, counted from 0 in the hostfile) did not start within 1 minutes" in node.text()


def test_a_world_size_that_does_not_divide_the_batch(recipe: Path, tmp_path: Path, scripts: list[Script]) -> None:
    nodes = Cluster(tmp_path, 2, scripts).start(
        "pretrain", str(recipe), f"run.dir={tmp_path / 'run'}", "batch.global_size=9"
    )
    assert [node.wait() for node in nodes] == [2, 2]
    assert "9 / 2 is not whole" in nodes[0].text()


@pytest.fixture
def network() -> Iterator[list[str]]:
    """Four network namespaces with an address of their own each, joined by a bridge."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("NODES WITH THEIR OWN ADDRESSES ARE NOT TESTED: it takes root and iproute2")
    tag = f"vf{os.getpid() % 10000}"
    spaces = [f"{tag}n{node}" for node in range(4)]

    def ip(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)

    if (made := ip(f"link add {tag}br type bridge")).returncode:
        pytest.skip(f"NODES WITH THEIR OWN ADDRESSES ARE NOT TESTED: no bridge can be made ({made.stderr.strip()})")
    ip(f"link set {tag}br up")
    for node, space in enumerate(spaces):
        for command in (
            f"netns add {space}", f"link add {tag}v{node} type veth peer name net0 netns {space}",
            f"link set {tag}v{node} master {tag}br up", f"-n {space} link set lo up",
            f"-n {space} addr add 10.77.0.{node + 1}/24 dev net0", f"-n {space} link set net0 up",
        ):  # fmt: skip
            assert ip(command).returncode == 0, command
    yield spaces
    for space in spaces:
        ip(f"netns del {space}")
    ip(f"link del {tag}br")


def test_nodes_with_their_own_addresses(
    recipe: Path, tmp_path: Path, scripts: list[Script], network: list[str]
) -> None:
    cluster, run = Cluster(tmp_path, 4, scripts), tmp_path / "run"
    before = {node: ["ip", "netns", "exec", space] for node, space in enumerate(network)}
    variables = {node: {"GLOO_SOCKET_IFNAME": "net0"} for node in range(4)}
    where = {"before": before, "variables": variables, "address": "10.77.0.1"}
    examined = cluster.start(
        "doctor", str(recipe), f"run.dir={run}", "--seconds", "0.2", "--images-per-second", "1", **where
    )
    assert [node.wait() for node in examined] == [0] * 4, examined[0].text()
    assert "4, all there" in examined[0].text()
    nodes = cluster.start("pretrain", str(recipe), f"run.dir={run}", **where)
    wait_until(lambda: newest_step(run) >= 8, what="the second checkpoint")
    nodes[3].lose()
    assert all(node.wait() != 0 for node in nodes)
    nodes = cluster.start("pretrain", str(recipe), f"run.dir={run}", exclude=["d"], **where)
    assert [node.wait() for node in nodes] == [0] * 3, nodes[0].text()
    losses = {step: line["loss"] for step, line in read_losses(run).items()}
    assert losses == pytest.approx(undisturbed_losses(recipe, tmp_path, scripts), rel=1e-5)


def test_torchrun_restarts_the_rest_by_itself_and_tells_a_stop_from_success(
    recipe: Path, tmp_path: Path, scripts: list[Script]
) -> None:
    run, port = tmp_path / "run", free_port()
    options = ["--nnodes", "1:2", "--rdzv_endpoint", f"127.0.0.1:{port}", "--max_restarts", "2"]
    command = ["pretrain", str(recipe), f"run.dir={run}", "run.length=400 steps", "optim.warmup=10 steps"]

    def start(node: int) -> Script:
        log = tmp_path / f"{node}.log"
        scripts.append(Script("torchrun.sh", *options, "--nproc_per_node", "1", *command, log=log))
        return scripts[-1]

    nodes = [start(0)]
    # The endpoint is on this machine for both, and the first to come holds the store, which must not be lost.
    wait_until(lambda: is_listening(port), what="the store of node 0")
    nodes.append(start(1))
    wait_until(lambda: newest_step(run) >= 8, what="the second checkpoint")
    nodes[1].lose()
    lost_at = newest_step(run)
    wait_until(lambda: newest_step(run) >= lost_at + 8, what="a checkpoint of the node that is left")
    nodes[0].interrupt()
    assert nodes[0].wait() == 75, nodes[0].text()


# What launch/slurm.sbatch asks of SLURM, for two nodes on this machine; calls that change a job are written down.
SLURM = {
    "scontrol": 'if [[ $1 = show ]]; then printf "localhost\\nb\\n"; else echo "scontrol $*" >>"$CALLS"; fi',
    "scancel": 'echo "scancel $*" >>"$CALLS"',
    "srun": """while [[ $1 = --* ]]; do shift; done
        for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
        status=0; for pid in "${pids[@]}"; do wait "$pid" || status=$?; done; exit $status""",
}


@pytest.mark.parametrize("array", [False, True])
def test_slurm_requeues_what_its_time_limit_stopped_and_ends_what_is_done(
    recipe: Path, tmp_path: Path, scripts: list[Script], array: bool
) -> None:
    run, calls, folder = tmp_path / "run", tmp_path / "calls", tmp_path / "bin"
    folder.mkdir()
    for name, body in SLURM.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "a pair", "SLURM_GPUS_ON_NODE": "1",
        **({"SLURM_ARRAY_JOB_ID": "7"} if array else {}),
    }  # fmt: skip
    command = ["pretrain", str(recipe), f"run.dir={run}", "run.length=200 steps", "optim.warmup=10 steps"]

    def submit() -> Script:
        scripts.append(Script("slurm.sbatch", *command, log=tmp_path / "job.log", variables=variables))
        return scripts[-1]

    job = submit()
    wait_until(lambda: newest_step(run) >= 8, what="the second checkpoint")
    for pid in descendants(job.process.pid):  # the warning before the time limit goes to every process of the step
        if b"srun" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGUSR1)
    assert job.wait() == (75 if array else 0), job.text()
    stopped_at = newest_step(run)
    assert 8 <= stopped_at < 200
    assert calls.exists() is not array
    if not array:
        assert calls.read_text() == f"scontrol requeue {os.getpid()}\n"
    job = submit()
    assert job.wait() == 0, job.text()
    assert newest_step(run) == 200
    if array:
        assert calls.read_text() == "scancel --state=PENDING 7\n"
    assert not list((ROOT / "runs").glob(f"*.{os.getpid()}")), "hostfile and marker are gone"
