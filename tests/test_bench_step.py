"""The step benchmark: what it prints can be read, and what it must refuse it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import head_of, layer_of
from torch import nn

from vitfreeze.bench.step import _MasterAdamW, format_step_benchmark, run_step_benchmark
from vitfreeze.model import LocalMIM
from vitfreeze.planner import read_step_times


def test_measures_every_prefix_and_the_planner_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitfreeze.bench.step._UNIT_BLOCKS", 1)  # the whole unit takes seconds, and is no subject here
    result = run_step_benchmark(
        "vit_tiny_test", frozen_layers=[8], img_size=64, micro_batch=2, rounds=1, warmup_rounds=0, device="cpu"
    )
    assert [row.frozen_layers for row in result.rows] == [0, 8]
    start, last = result.rows
    assert start.ratio == start.ratio_of_flops == 1
    assert 0.2 < last.ratio_of_flops < 0.6
    assert last.step_ms < start.step_ms
    for row in result.rows:
        parts = row.targets_ms + row.forward_ms + row.backward_ms + row.optimizer_ms
        assert parts == pytest.approx(row.step_ms)
        assert row.images_per_second == pytest.approx(2000 / row.step_ms)
        assert row.in_units == pytest.approx(row.step_ms / result.unit_ms)
        assert row.peak_memory_bytes is None or row.peak_memory_bytes > 1e7
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result.to_dict()))
    times = read_step_times(path)
    assert times.step_ms == {0: start.step_ms, 8: last.step_ms}
    assert times.images == 2
    table = format_step_benchmark(result)
    assert result.device in table
    assert [line.split()[0] for line in table.splitlines()[-2:]] == ["0", "8"]


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ("vit_giant", {}, "size 'vit_giant': allowed are vit_tiny_test, "),
        ("vit_tiny_test", {"precision": "fp8"}, "precision 'fp8': allowed are fp32, bf16, fp16"),
        ("vit_tiny_test", {"clock": "sundial"}, "clock 'sundial': allowed are wall, processor"),
        ("vit_tiny_test", {"frozen_layers": [9]}, "9 frozen layers are not possible, expected 0 to depth 8"),
        ("vit_tiny_test", {"rounds": 0}, "rounds is 0, expected at least 1"),
        ("vit_tiny_test", {"micro_batch": 0}, "micro_batch is 0, expected at least 1"),
        ("vit_tiny_test", {"img_size": 100}, "img_size 100 is not a multiple of patch_size 8"),
    ],
)
def test_refuses(size: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_step_benchmark(size, device="cpu", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_moves_only_what_has_a_gradient(dtype: torch.dtype) -> None:
    model = LocalMIM(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, decoder_embed_dim=16, decoder_num_heads=2
    ).to(dtype)
    optimizer = _MasterAdamW(model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _ in range(20):  # small steps add up in the fp32 copies, where bfloat16 alone would lose them
        model(torch.randn(2, 3, 32, 32), frozen_layers=3).loss.backward()
        optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    frozen = {name for name in before if (layer_of(name) or 9) <= 2 and not name.startswith("heads")}
    frozen |= {name for name in before if layer_of(name) == 0}
    frozen |= {name for name in before if head_of(name) in (0, 2)}  # depth 4 taps blocks 2, 4, 2 and 4
    assert moved.isdisjoint(frozen)
    assert {"blocks.2.attn.qkv.weight", "heads.1.decoder.embed.weight"} <= moved
    assert all(weight.grad is None for weight in model.parameters())
    assert isinstance(optimizer.masters[0], nn.Parameter) == (dtype == torch.float32)
