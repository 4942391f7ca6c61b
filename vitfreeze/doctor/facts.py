"""What one rank sees of its own machine."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfreeze.ranks import LaunchEnvironment
from vitfreeze.rendezvous import software_versions

SHARED_MEMORY = Path("/dev/shm")
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Sides of the square matrices that are multiplied to see how fast the device is.
GPU_MATRIX, CPU_MATRIX = 4096, 512


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPU of a rank, and what torch's build has for it."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    built_for: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank sees of its own machine.

    Attributes:
        versions: of the software, by package.
        gpus_seen: GPUs that torch can use here; driver_says: what nvidia-smi lists, one GPU a line; '' without it.
        gpu: the one that is this rank's; None without.
        precisions: '' for each precision in which the device multiplies rightly, else what went wrong.
        teraflops: 1e12 operations per second of large matrix products in each precision that works.
        shared_memory_bytes: size of /dev/shm; None where there is none.
    """

    rank: int
    local_rank: int
    host: str
    versions: Mapping[str, str]
    torch_cuda: str
    gpus_seen: int
    driver_says: str
    gpu: Gpu | None
    precisions: Mapping[str, str]
    teraflops: Mapping[str, float]
    shared_memory_bytes: int | None
    engine_error: str

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> RankFacts:
        """Read what `dataclasses.asdict` made of another rank's."""
        gpu = facts["gpu"]
        if gpu is not None:
            gpu = Gpu(**{**gpu, "capability": tuple(gpu["capability"]), "built_for": tuple(gpu["built_for"])})
        return cls(**{**facts, "gpu": gpu})


def collect_facts(launch: LaunchEnvironment) -> RankFacts:
    """Collect what this rank sees of its machine; some seconds."""
    gpus_seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_gpu = launch.local_rank < gpus_seen
    device = torch.device("cuda", launch.local_rank) if has_gpu else torch.device("cpu")
    gpu = _describe_gpu(device) if has_gpu else None
    precisions, teraflops = {}, {}
    for name, dtype in DTYPES.items():
        precisions[name] = _try_product(device, dtype)
        if not precisions[name] and (gpu is not None or name == "fp32"):  # halves crawl on most CPUs
            teraflops[name] = measure_teraflops(device, dtype)
    return RankFacts(
        rank=launch.rank, local_rank=launch.local_rank, host=socket.gethostname(), versions=software_versions(),
        torch_cuda=torch.version.cuda or "", gpus_seen=gpus_seen, driver_says=_ask_driver(), gpu=gpu,
        precisions=precisions, teraflops=teraflops, engine_error=_try_engine(),
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
    )  # fmt: skip


def measure_teraflops(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """Return how many 1e12 operations per second the device does in products of large matrices."""
    side = GPU_MATRIX if device.type == "cuda" else CPU_MATRIX
    left = torch.randn(side, side, device=device).to(dtype)
    return 2e-12 * side**3 / time_call(lambda: left @ left, device=device, seconds=seconds)


def time_call(call: Callable[[], object], *, device: torch.device, seconds: float) -> float:
    """Return the seconds that one call takes, from as many as fit into `seconds` after a first that is not counted."""
    call()
    _finish(device)
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or not calls:
        for _ in range(4):
            call()
        _finish(device)
        calls += 4
    return (time.perf_counter() - begin) / calls


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _try_product(device: torch.device, dtype: torch.dtype) -> str:
    """Multiply two small matrices and return what is wrong with the result; '' if nothing is."""
    exact = torch.arange(64, dtype=torch.float32).view(8, 8) % 7  # sums of these are exact in every precision
    try:
        product: Tensor = (exact.to(device, dtype) @ exact.to(device, dtype)).float().cpu()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return "" if torch.equal(product, exact @ exact) else "a matrix product comes out wrong"


def _describe_gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # a build without code for this GPU may fail at the first touch
        free, total = 0, properties.total_memory
    return Gpu(
        name=properties.name, capability=(properties.major, properties.minor), total_bytes=total, free_bytes=free,
        built_for=tuple(torch.cuda.get_arch_list()),
    )  # fmt: skip


def _ask_driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _try_engine() -> str:
    """Load DeepSpeed, whose import fails on half an installation, and return what went wrong."""
    try:
        import vitfreeze.engine  # noqa: F401
    except Exception as error:  # whatever it is, it is what the user must read
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""
