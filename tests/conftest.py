"""What every test may ask for."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from drawn_shards import draw_shards
from processes import built_extensions

SHARED = Path(__file__).resolve().parents[2] / "shared"


def asks_for(config: pytest.Config, marker: str) -> bool:
    """Tell whether `-m` asks for the tests of a marker."""
    return bool(re.search(rf"(?<!not )\b{marker}\b", config.getoption("markexpr") or ""))


def pytest_configure(config: pytest.Config) -> None:
    """Let the tests run on the CPU alike everywhere, unless `-m gpu` asks for those that need a GPU."""
    if not asks_for(config, "gpu"):
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process for each core already


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes `-n auto` shares the tests among: long tests, and those of a GPU, want it for them."""
    if asks_for(config, "gpu") or asks_for(config, "slow"):
        return 1
    return min(len(os.sched_getaffinity(0)), 4)


@pytest.fixture(scope="session", autouse=True)
def communication_kernel() -> None:
    """Have DeepSpeed's kernel built before any test starts ranks: cold builds side by side outlast time limits."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(built_extensions())


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Hear Ctrl-C, and let started programs hear it: a job in the background of a shell begins deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with reference figures and photographs that lies beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"PARITY AND REAL-IMAGE TESTS ARE NOT RUN: no folder {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 100 drawn training images and 25 for validation, 64 pixels, 12 classes."""
    return draw_shards(tmp_path_factory.mktemp("shards") / "demo", samples=125)
