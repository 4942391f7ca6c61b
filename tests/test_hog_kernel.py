"""The Triton kernel for HOG targets, without a GPU: in Triton's interpreter, and compiled for every kind of GPU."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED

from vitfreeze.model import hog_targets, targets
from vitfreeze.model.targets import TargetMaker

triton = pytest.importorskip("triton", reason="THE KERNEL FOR HOG IS NOT TESTED: Triton is not installed")
TESTS = Path(__file__).parent
PHOTOGRAPHS = SHARED / "images" / "imagenet_mini" / "ILSVRC2012_img_val.tar"
CELLS = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What went wrong in each check, all of them made by one process: it takes longer to start than most checks do."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    archives = [str(PHOTOGRAPHS)] if PHOTOGRAPHS.is_file() else []
    command = [sys.executable, str(TESTS / "hog_kernel_scenarios.py"), *archives]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-6000:]
    problems: dict[str, str] = json.loads(done.stdout)
    return problems


@pytest.mark.parametrize("what", ["synthetic", "few levels", "nan"])
def test_equals_the_plain_version(what: str, interpreted: dict[str, str]) -> None:
    assert interpreted[what] == ""


def test_equals_the_plain_version_on_photographs(shared_dir: Path, interpreted: dict[str, str]) -> None:
    if not PHOTOGRAPHS.is_file():
        pytest.skip(f"THE KERNEL FOR HOG IS NOT TESTED ON PHOTOGRAPHS: no file {PHOTOGRAPHS}")
    assert interpreted["photographs"] == ""


def compile_for(capability: int, *, nbins: int, kind: str, fuses: bool = False) -> Any:
    """Compile ahead of time; bytes come with a table, floats with biases."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vitfreeze.model.hog_kernel import fill_targets, plan_launches

    images = torch.empty(1, 3, 224, 224, device="meta")
    launches, _ = plan_launches(images, cell_sizes=CELLS, nbins=nbins)
    constants = {**launches[1].constants, ("bias" if kind == "u8" else "table"): None}
    del constants["batch"]
    pointers = dict.fromkeys(("table", "bias", "contrast", "targets"), "*fp32")
    signature = {"images": f"*{kind}", **pointers, "batch": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=fill_targets, signature=signature, constexprs=constants)
    options = {"num_warps": launches[1].num_warps, "enable_fp_fusion": fuses}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(("nbins", "kind"), [(9, "u8"), (18, "fp32")])
@pytest.mark.parametrize("capability", [70, 80, 90, 100])
def test_compiles_for_every_gpu_and_spills_nothing(
    capability: int, nbins: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_for(capability, nbins=nbins, kind=kind)
    assert not find_fused(compiled)
    assert "div.rn.f32" in compiled.asm["ptx"]
    assert "sqrt.rn.f32" in compiled.asm["ptx"]
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    assert 0 < usage["REG"] <= 96
    assert usage["STACK"] == usage["LOCAL"] == 0


def find_fused(compiled: Any) -> list[str]:
    """Return what the compiler fused; the arctangent's own fused operations flush denormal numbers to zero."""
    return re.findall(r"fma\.rn\.f32", compiled.asm["ptx"])


def test_fused_operations_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert find_fused(compile_for(90, nbins=9, kind="u8", fuses=True))


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.uint8, 0.19e9, 0.20e9), (torch.float32, 0.42e9, 0.43e9)])
def test_moves_no_more_than_it_needs(dtype: torch.dtype, least: float, most: float) -> None:
    from vitfreeze.model.hog_kernel import plan_launches

    images = torch.empty(256, 3, 224, 224, dtype=dtype, device="meta")
    table = torch.empty(3, 256, device="meta") if dtype == torch.uint8 else None
    launches, made = plan_launches(images, cell_sizes=CELLS, nbins=9, bias=torch.empty(2, device="meta"), table=table)
    assert [launch.reads[0] is images for launch in launches] == [True, True]
    written = sum(target.nbytes for target in made)
    assert written == 256 * (56**2 + 28**2 + 14**2 + 7**2) * 27 * 4
    moved = sum(launch.num_bytes for launch in launches)
    assert 0 < moved - 2 * images.nbytes - written < 10_000
    assert least < moved < most


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, error: float) -> tuple[TargetMaker, list[int]]:
    """Return a maker that meets a kernel which is wrong by so much, and the list of its calls."""
    calls: list[int] = []

    def ask(images, *, cell_sizes, nbins, bias, pixels):  # type: ignore[no-untyped-def]
        calls.append(len(images))
        return [target + error for target in hog_targets(images.plain, cell_sizes=cell_sizes, nbins=nbins, bias=bias)]

    monkeypatch.setattr(targets, "_ask_kernel", ask)
    monkeypatch.setattr(targets, "find_obstacle", lambda cells, device: None)
    monkeypatch.setattr(targets, "hog_targets", lambda images, **rest: hog_targets(images.plain, **rest))
    return TargetMaker(), calls


class ImagesOnAGpu:
    """Looks like images on a GPU to the maker."""

    def __init__(self) -> None:
        self.plain = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.shape, self.dtype, self.device = self.plain.shape, self.plain.dtype, torch.device("cuda", 0)

    def __len__(self) -> int:
        return len(self.plain)


@pytest.mark.parametrize(("error", "calls_of_three"), [(0.0, 3), (0.01, 1)])
def test_a_kernel_that_is_wrong_is_switched_off_loudly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: float, calls_of_three: int
) -> None:
    maker, calls = on_a_gpu(monkeypatch, error=error)
    images = ImagesOnAGpu()
    for _ in range(3):
        (made,) = maker.make(images, cell_sizes=[4], nbins=9, pixels=None)  # type: ignore[arg-type]
        assert torch.equal(made, *hog_targets(images.plain, cell_sizes=[4], nbins=9))
    assert len(calls) == calls_of_three
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == (error > 0)
    assert all("SWITCHED OFF" in record.message for record in errors)


def test_without_triton_the_plain_version_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    maker, calls = on_a_gpu(monkeypatch, error=0.0)
    monkeypatch.setattr(targets, "find_obstacle", lambda cells, device: "Triton is not installed")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            maker.make(ImagesOnAGpu(), cell_sizes=[4], nbins=9, pixels=None)  # type: ignore[arg-type]
    assert not calls
    assert [record.message.count("Triton is not installed") for record in caplog.records] == [1]
