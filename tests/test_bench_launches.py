"""What a step asks of a GPU: the counts are held, so that nobody adds to them without noticing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from processes import run_ranks

from vitfreeze.config import load_config

pytestmark = pytest.mark.distributed
# ViT-B's depth and number of tensors; the counts do not depend on the width.
NARROW = ("model.embed_dim=48", "model.num_heads=3", "model.decoder_embed_dim=32", "model.decoder_num_heads=2")
# frozen layers: most launches in all, and in the optimizer step
BOUNDS: dict[str, dict[int, tuple[int, int]]] = {
    "zero1_bf16": {0: (1000, 180), 12: (350, 30)},
    "zero1_fp16": {0: (1000, 180), 12: (350, 30)},
    "zero2_bf16": {0: (1000, 150), 12: (350, 30)},
}


def count(ds_config: str) -> dict[str, Any]:
    from vitfreeze.bench.launches import count_launches, format_launch_count

    settings = (*NARROW, "batch.global_size=2", "batch.micro_size=2", f"run.ds_config={ds_config}")
    result = count_launches(load_config("paper", settings))
    rows = {
        row.frozen_layers: {
            "launches": row.launches,
            "optimizer": row.phases["optimizer"].launches,
            "waits": {name: dict(phase.waits) for name, phase in row.phases.items()},
            "cpu_only": sum(phase.cpu_only for phase in row.phases.values()),
            "bytes": row.bytes,
            "targets": row.targets.launches,
        }
        for row in result.rows
    }
    assert json.loads(json.dumps(asdict(result)))["rows"][0]["phases"]["forward"]["operations"]["addmm"] > 50
    return {"rows": rows, "text": format_launch_count(result)}


@pytest.mark.parametrize("ds_config", BOUNDS)
def test_a_step_launches_no_more_than_this(ds_config: str) -> None:
    (found,) = run_ranks(count, ds_config, world_size=1)
    for frozen_layers, (most, most_in_optimizer) in BOUNDS[ds_config].items():
        row = found["rows"][frozen_layers]
        assert 0.9 * most < row["launches"] <= most
        assert 0.5 * most_in_optimizer < row["optimizer"] <= most_in_optimizer
        assert row["cpu_only"] > 0
        assert row["bytes"] > 10**6
        assert row["targets"] > 50
        waits = {name: sum(places.values()) for name, places in row["waits"].items()}
        assert waits == {"forward": 0, "backward": 0, "optimizer": int("fp16" in ds_config)}, row["waits"]
    assert "not counted: views" in found["text"]


def waits_of_samples() -> list[str]:
    import torch

    from vitfreeze.bench.launches import PhaseCount, _HostCopies, _Launches

    phase, x = PhaseCount(), torch.ones(4)
    with _HostCopies(phase), _Launches(phase, PhaseCount()):
        bool(x.sum() > 3), x.sum().item(), torch.tensor(1.0, device="cpu"), x.cpu(), x.to("cpu"), x.tolist()
        x.to("cpu", non_blocking=True), x.view(2, 2), torch.empty(3)
    names = sorted(what.split()[0] for what, times in phase.waits.items() for _ in range(times))
    return [str(phase.launches), *names]


def test_waits_are_seen() -> None:
    assert waits_of_samples() == ["3", "_local_scalar_dense", "_local_scalar_dense", "cpu", "tensor", "to", "tolist"]
