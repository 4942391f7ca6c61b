"""The benchmark of the first hour on a GPU, rehearsed on the CPU: tiny sizes, the same code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run_ranks
from tiny_shards import write_shards

from vitfreeze.cli import parse_arguments

pytestmark = pytest.mark.distributed
# What the benchmark asks of the authors' module, in a few lines.
MODELS_MIM = """
from torch import nn

class Model(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(9))
        self.last = nn.Linear(3, 1)
        for index, layer in enumerate(self.layers):
            for parameter in layer.parameters():
                parameter.layer_index = index

    def forward(self, images, min_active_layer_index, mask_ratio):
        tokens = images.mean(dim=(2, 3))
        for layer in self.layers:
            tokens = layer(tokens)
        return self.last(tokens).square().mean()

def MIM_vit_tiny_test(**settings):
    print("Scaling method is", settings["how_scale"])
    return Model(**settings)
"""
ON_CPU = {
    "step": {"peak_bytes", "launches", "busy_share", "waits"},
    "hog": {"kernel_ms", "ratio", "agrees"},
    "drop": {"peak_bytes", "peak_over_plan"},
    "held memory": {"never_grows"},
}


def measure(folder: str, arguments: list[str]) -> tuple[int, str, str]:
    import contextlib
    import io

    from vitfreeze.engine.counting import count_on_cpu

    if not torch.cuda.is_available():
        torch._dynamo.config.disable = True  # tests/test_compile.py compiles
        count_on_cpu(lambda: None)  # fp16 too, as on a GPU
    output = str(Path(folder, "gpu.json"))
    parsed = parse_arguments(["bench", "gpu", "--rounds", "1", "--images", "2", *arguments, "-o", output])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = parsed.handler(parsed)
    return status, printed.getvalue(), Path(output).read_text()


def cells_of(written: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in json.loads(written)["cells"]:
        groups.setdefault(cell["group"], []).append(cell)
    return groups


@pytest.mark.timeout(900)  # a machine that others use too
def test_the_rehearsal_measures_every_cell(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [40, 40])
    (tmp_path / "authors").mkdir()
    (tmp_path / "authors" / "models_mim.py").write_text(MODELS_MIM)
    settings = ["model.img_size=32", "data.workers=0", f"data.train={shards}", "run.ds_config=cpu"]
    options = ["--models", "vit_tiny_test", "--reference", str(tmp_path / "authors")]
    ((status, table, written),) = run_ranks(measure, str(tmp_path), [*settings, *options], world_size=1, timeout=800)
    assert status == 0, table
    groups = cells_of(written)
    counts = {group: len(cells) for group, cells in groups.items()}
    assert counts == {
        "step": 2 * 3 + 4, "hog": 1, "drop": 9, "held memory": 1, "overflow": 1, "shards": 1, "restart": 1,
        "two ranks": 1, "authors' code": 3,
    }  # fmt: skip
    for group, cells in groups.items():
        for cell in cells:
            missing = {key for key, value in cell["values"].items() if value is None}
            assert missing == set(cell["reasons"]) - {"planned_bytes"} == ON_CPU.get(group, set()), cell
            assert all(value > 0 for key, value in cell["values"].items() if key.endswith("step_ms"))
    assert all(cell["values"]["drop_ms"] > 0 for cell in groups["drop"][1:])
    assert groups["restart"][0]["values"]["ends"]
    overflow = groups["overflow"][0]["values"]
    assert overflow["skipped"]
    assert overflow["next_step_trains"]
    assert not overflow["weights_moved"]
    assert 0 < overflow["scale_after"] <= overflow["scale_before"]  # DeepSpeed forgives the first
    assert table.count("| drop |") == 1
    assert "busy_share: the profiler saw no GPU" in table
    assert "Scaling method" not in table


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: what a GPU does was NOT measured")
def test_on_a_gpu_every_cell_is_measured_and_as_it_should_be(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [40, 40])
    settings = ["--models", "vit_tiny_test", "model.img_size=64", "data.workers=0", f"data.train={shards}"]
    ((status, table, written),) = run_ranks(measure, str(tmp_path), settings, world_size=1, timeout=800)
    assert status == 0, table
    groups = cells_of(written)
    assert all(cell["values"]["launches"] > 0 for cell in groups["step"] if cell["values"]["step_ms"] is not None)
    assert groups["hog"][0]["values"]["agrees"]
    assert groups["held memory"][0]["values"]["never_grows"]
    assert groups["restart"][0]["values"]["ends"]
    assert groups["overflow"][0]["values"]["skipped"]
    assert not groups["overflow"][0]["values"]["weights_moved"]


def measure_failing() -> tuple[dict[str, bool], str]:
    from vitfreeze.bench import gpu
    from vitfreeze.config import load_config

    def fail() -> list[gpu.Cell]:
        raise RuntimeError("out of memory")

    groups = {"bad": fail, "good": lambda: [gpu.Cell(group="good", name="one", values={"ms": 1.5})]}
    gpu.list_groups = lambda trial, reference: list(groups.items())
    config = load_config("paper", ["run.ds_config=cpu"])
    result = gpu.run_gpu_benchmark(config, models=("vit_tiny_test",), images=2, rounds=1)
    late = gpu.run_gpu_benchmark(config, models=("vit_tiny_test",), images=2, rounds=1, minutes=0)
    assert ["not begun" in cell.reasons[""] for cell in late.cells] == [True, True]
    return {cell.group: cell.failed for cell in result.cells}, gpu.format_gpu_benchmark(result)


def test_a_cell_that_fails_is_told_and_others_go_on() -> None:
    ((failed, table),) = run_ranks(measure_failing, world_size=1)
    assert failed == {"bad": True, "good": False}
    assert "bad: RuntimeError: out of memory" in table
    assert "| one | 1.5 |" in table


def test_busy_share_and_waits_of_a_profile() -> None:
    from torch.autograd import DeviceType

    from vitfreeze.bench.gpu.steps import summarize_events

    def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))

    events = [
        event("gemm", 0, 40), event("copy", 30, 50), event("inside", 35, 45), event("norm", 75, 100),
        event("cudaLaunchKernel", 0, 1, DeviceType.CPU), event("cudaDeviceSynchronize", 90, 100, DeviceType.CPU),
        event("cudaStreamSynchronize", 50, 60, DeviceType.CPU),
    ]  # fmt: skip
    assert summarize_events(events, steps=2) == {"launches": 2.0, "busy_share": 0.75, "waits": 0.5}
