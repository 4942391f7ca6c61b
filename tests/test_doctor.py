"""The doctor's checks: on machines that are not here, and on two real processes that are."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import fork_server, free_port
from tiny_shards import write_shards

from vitfreeze.config import load_config
from vitfreeze.doctor import Finding, format_findings
from vitfreeze.doctor.checks import (
    FolderProbe,
    Links,
    Need,
    ShardReading,
    check_clocks,
    check_disk,
    check_gpus,
    check_links,
    check_memory,
    check_precision,
    check_ranks,
    check_run_folder,
    check_shards,
    check_shared_memory,
    check_speed,
    check_versions,
)
from vitfreeze.doctor.facts import Gpu, RankFacts
from vitfreeze.doctor.findings import ok, red, unseen
from vitfreeze.doctor.run_checks import find_need, label_hosts
from vitfreeze.ranks import LaunchEnvironment

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
GIB = 2**30
V100 = Gpu(name="Tesla V100", capability=(7, 0), total_bytes=32 * GIB, free_bytes=31 * GIB, built_for=CU126)
A100 = Gpu(name="A100", capability=(8, 0), total_bytes=80 * GIB, free_bytes=79 * GIB, built_for=CU130)


def rank_with(gpu: Gpu | None, **facts: Any) -> RankFacts:
    usual = RankFacts(
        rank=0, local_rank=0, host="node-a", torch_cuda="12.6", gpus_seen=8 if gpu else 0, driver_says="", gpu=gpu,
        versions={"python": "3.11", "torch": "2.14.1+cu126", "deepspeed": "0.19.8", "timm": "1.0", "vitfreeze": "ab"},
        precisions={"fp32": "", "fp16": "", "bf16": ""}, teraflops={"fp32": 12.0, "fp16": 90.0},
        shared_memory_bytes=64 * GIB, engine_error="",
    )  # fmt: skip
    return replace(usual, **facts)


def two_nodes(first: RankFacts, second: RankFacts) -> list[RankFacts]:
    return [replace(first, rank=0, host="node-a"), replace(second, rank=1, host="node-b")]


def assert_red(finding: Finding, *words: str) -> None:
    assert finding.fit is False
    assert finding.cure, "a red line has a cure"
    text = f"{finding.found} -> {finding.cure}"
    for word in words:
        assert word in text, text


def test_a_v100_under_a_build_without_it_is_told_which_wheel() -> None:
    bad = replace(
        rank_with(replace(V100, built_for=CU130)), versions={**rank_with(V100).versions, "torch": "2.14.1+cu130"}
    )
    finding = check_gpus(two_nodes(rank_with(A100), bad))
    assert_red(
        finding, "Tesla V100 (sm_70) on rank 1 (node-b)", "2.14.1+cu130", "torch 2.14.1+cu126", "TORCH_INDEX_URL"
    )


def test_gpus_that_torch_cannot_see() -> None:
    seen = "Tesla V100, 7.0, 470.82"
    assert_red(check_gpus([rank_with(None, driver_says=seen)]), seen, "driver is too old for CUDA 12.6")
    assert_red(check_gpus([rank_with(None, driver_says=seen, torch_cuda="")]), "CPU build")


def test_more_ranks_than_gpus_and_nodes_without() -> None:
    assert_red(check_gpus([rank_with(None, gpus_seen=4, local_rank=4)]), "number 4", "4 GPUs", "slots")
    assert_red(check_gpus(two_nodes(rank_with(V100), rank_with(None))), "none on rank 1 (node-b)")


def test_older_and_newer_gpus() -> None:
    p100 = replace(V100, name="P100", capability=(6, 0), built_for=CU130)
    assert_red(check_gpus([rank_with(p100)]), "not supported")
    newer = replace(V100, name="B300", capability=(10, 3), built_for=CU126)
    assert_red(check_gpus([rank_with(newer)]), "sm_103", "newer CUDA")
    assert check_gpus([rank_with(V100)]).fit
    assert check_gpus([rank_with(None)]).fit


def test_other_versions_are_named_with_their_hosts() -> None:
    versions = rank_with(V100).versions
    other = rank_with(V100, versions={**versions, "deepspeed": "0.18.0"})
    assert_red(check_versions(two_nodes(rank_with(V100), other)), "0.18.0 on rank 1 (node-b)", "constraints.txt")
    assert_red(check_versions([rank_with(V100, versions={**versions, "timm": "not installed"})]), "timm")
    assert_red(check_versions([rank_with(V100, engine_error="ImportError: libcuda")]), "libcuda")
    assert check_versions(two_nodes(rank_with(V100), rank_with(V100))).fit


def test_bf16_on_a_v100_and_halves_on_a_cpu() -> None:
    assert_red(check_precision([rank_with(V100)], wanted="bf16"), "bf16", "zero1_fp16")
    assert check_precision([rank_with(V100)], wanted="fp16").fit
    assert check_precision([rank_with(A100)], wanted="bf16").fit
    assert_red(check_precision([rank_with(None)], wanted="fp16"), "fp32", "run.ds_config=cpu")
    broken = rank_with(A100, precisions={"fp32": "", "fp16": "no kernel image", "bf16": ""})
    assert_red(check_precision([broken], wanted="fp16"), "no kernel image")


def test_memory_that_the_plan_does_not_find() -> None:
    facts = [rank_with(V100)]
    assert check_memory(facts, Need(memory_bytes=20 * GIB, micro_batch=128)).fit
    assert_red(check_memory(facts, Need(memory_bytes=40 * GIB, micro_batch=128)), "batch.micro_size=64")
    taken = [rank_with(replace(V100, free_bytes=4 * GIB))]
    assert_red(check_memory(taken, Need(memory_bytes=20 * GIB, micro_batch=128)), "another process")
    assert check_memory([rank_with(None)], Need(memory_bytes=1.0, micro_batch=1)).fit is None


def test_a_slow_gpu_is_found() -> None:
    slow = rank_with(V100, teraflops={"fp16": 60.0})
    assert_red(check_speed(two_nodes(rank_with(V100), slow), precision="fp16"), "60.0 TFLOP/s on rank 1 (node-b)")
    assert check_speed(two_nodes(rank_with(V100), rank_with(V100)), precision="fp16").fit
    assert check_speed([rank_with(None)], precision="fp32").fit is None


def test_clocks() -> None:
    assert_red(check_clocks([0.0, -3.5, 0.1], ["a", "b", "c"]), "3500 ms", "rank 1 on b", "chronyd")
    assert check_clocks([0.0, 0.2], ["a", "b"]).fit
    assert check_clocks([0.0], ["a"]).fit is None


def test_a_slow_or_broken_network() -> None:
    links = Links(backend="nccl", all_ranks=0.1, within_nodes=40.0, between_nodes=0.1)
    need = Need(gradient_bytes=2e8, compute_seconds=0.5)
    assert_red(check_links(links, need, world_size=16), "0.10 between nodes", "3750 ms", "NCCL_IB_HCA")
    assert check_links(replace(links, all_ranks=10.0), need, world_size=16).fit
    assert check_links(links, Need(), world_size=16).fit
    broken = replace(links, error="unhandled system error")
    assert_red(check_links(broken, need, world_size=16), "NCCL_SOCKET_IFNAME")
    assert_red(check_links(replace(broken, backend="gloo"), need, world_size=16), "GLOO_SOCKET_IFNAME")


def test_shards_that_are_missing_other_or_slow() -> None:
    good = ShardReading(fingerprint="8 shards", images_per_second=900.0, workers=6)
    hosts = ["a", "b"]

    def check(second: ShardReading) -> Finding:
        return check_shards([good, second], hosts, Need(images_per_second=800.0, basis="it needs"))

    assert check(good).fit
    assert_red(check(replace(good, error="folder /data holds no *.tar file")), "no *.tar", "rank 1 (b)", "data.train")
    assert_red(check(replace(good, fingerprint="7 shards")), "7 shards on rank 1 (b)", "verify")
    assert_red(check(replace(good, images_per_second=400.0)), "rank 1 (b)", "data.workers=13")


def test_memory_disk_and_folder() -> None:
    facts = [rank_with(V100, shared_memory_bytes=64 * 2**20)]
    assert_red(check_shared_memory(facts, Need(shared_memory_bytes=float(GIB))), "64.00 MiB", "--shm-size")
    assert check_shared_memory(facts, Need()).fit
    probe, hosts = FolderProbe(error="", sees_rank_0=True, free_bytes=GIB), ["a", "b"]
    assert check_run_folder([probe, probe], hosts, folder="runs/x").fit
    readonly = replace(probe, error="runs/x: Read-only file system")
    assert_red(check_run_folder([probe, readonly], hosts, folder="runs/x"), "Read-only", "rank 1 (b)")
    assert_red(check_run_folder([probe, replace(probe, sees_rank_0=False)], hosts, folder="runs/x"), "share")
    assert_red(check_disk([probe], Need(saved_bytes=5.0 * GIB)), "5.00 GiB", "checkpoint.keep")
    assert check_disk([probe], Need(saved_bytes=1.0)).fit


def test_a_batch_that_does_not_divide() -> None:
    def batch_on(world_size: int) -> Finding:
        launch = replace(LaunchEnvironment.read({}), world_size=world_size)
        batch = find_need(config, [rank_with(None)], launch=launch, images_per_second=None)[1]
        assert batch is not None
        return batch

    config = load_config("paper", ["batch.micro_size=null"])
    assert_red(batch_on(24), "2048 / 24")
    assert batch_on(16).fit


def test_hosts_of_one_name_are_told_apart() -> None:
    assert label_hosts(["a", "a", "b", "b"], local_size=2) == ["a", "a", "b", "b"]
    assert label_hosts(["vm", "vm", "vm"], local_size=1) == ["vm/node 0", "vm/node 1", "vm/node 2"]
    found = check_ranks(two_nodes(rank_with(None), rank_with(None))).found
    assert found == "2, all there: 1 on node-a, 1 on node-b"


def test_the_table_shows_each_cure_below_its_line() -> None:
    findings = {"ranks": ok("2"), "disk": red("full", cure="free some"), "clocks": unseen("one rank")}
    assert format_findings(findings, colour=False).splitlines() == [
        "ranks   ok   2", "disk    RED  full", "             -> free some", "clocks  -    one rank", "",
        "1 of 3 checks are red",
    ]  # fmt: skip
    assert "\033[31mRED " in format_findings(findings, colour=True)
    assert format_findings({"ranks": ok("2")}, colour=False).endswith("fit to train")


def _run_rank(arguments: Sequence[str], variables: dict[str, str], out: Any) -> None:
    os.environ.update(variables)
    from vitfreeze.cli import main

    text, status = io.StringIO(), 0
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            main(list(arguments))
        except SystemExit as stop:
            status = int(stop.code or 0)
    out.send((status, text.getvalue()))


def run_doctor_on(arguments_of_ranks: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Run `vitfreeze doctor` in one process for each list of arguments and return status and output of each."""
    context = fork_server()
    port, pipes, processes = free_port(), [], []
    for rank, arguments in enumerate(arguments_of_ranks):
        variables = {
            "RANK": str(rank), "WORLD_SIZE": str(len(arguments_of_ranks)), "LOCAL_RANK": "0", "LOCAL_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(["doctor", *arguments], variables, sender))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    answers = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join(60)
    return answers


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    shards = write_shards(tmp_path / "shards", [40, 40])
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {{size: vit_tiny_test, img_size: 32}}\ndata: {{train: {shards}, workers: 0}}\n"
        f"batch: {{global_size: 8}}\nrun: {{dir: {tmp_path / 'run'}, length: 9 steps, ds_config: cpu}}\n"
        "optim: {warmup: 1 steps}\n"
    )
    return path


QUICK = ("--seconds", "0.2", "--images-per-second", "1", "--timeout", "60")


@pytest.mark.distributed
def test_two_real_ranks_are_fit(recipe: Path) -> None:
    (status, text), (other_status, other_text) = run_doctor_on([[str(recipe), *QUICK]] * 2)
    assert (status, other_status) == (0, 0), text
    assert "fit to train" in text
    assert "gloo: " in text
    assert "2 shards of 80 samples" in text
    assert "micro-batch 4, 1 of them a step" in text
    assert not other_text.strip(), "only rank 0 speaks"
    assert not (recipe.parent / "run").exists(), "the run folder is left as it was"


@pytest.mark.distributed
def test_two_real_ranks_with_other_shards_and_a_batch_that_does_not_divide(recipe: Path, tmp_path: Path) -> None:
    elsewhere = write_shards(tmp_path / "elsewhere", [40, 39])
    (status, text), _ = run_doctor_on([[str(recipe), *QUICK], [str(recipe), f"data.train={elsewhere}", *QUICK]])
    assert status == 1
    assert "2 shards of 79 samples" in text.replace("\n" + " " * 20, " ")
    answers = run_doctor_on([[str(recipe), "batch.global_size=9", *QUICK]] * 2)
    assert [status for status, _ in answers] == [1, 1]
    assert "9 / 2 is not whole" in answers[0][1]
