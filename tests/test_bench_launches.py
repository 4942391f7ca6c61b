"""What a step asks of a GPU: the counts are held, so that nobody adds to them without noticing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from processes import run_ranks

from vitfreeze.config import load_config

pytest.importorskip("triton", reason="THE LAUNCHES OF A STEP ARE NOT COUNTED: Triton is not installed")
pytestmark = pytest.mark.distributed
# ViT-B's depth and number of tensors; the counts do not depend on the width.
NARROW = ("model.embed_dim=48", "model.num_heads=3", "model.decoder_embed_dim=32", "model.decoder_num_heads=2")
# frozen layers: most launches in all, and in the optimizer step
BOUNDS: dict[str, dict[int, tuple[int, int]]] = {
    "zero1_bf16": {0: (930, 180), 12: (290, 30)},
    "zero1_fp16": {0: (930, 180), 12: (290, 30)},
    "zero2_bf16": {0: (930, 150), 12: (290, 30)},
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
            "targets": dict(row.targets.operations),
            "bytes of targets": row.targets.bytes,
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
        assert row["targets"] == {"find_contrast": 1, "fill_targets": 1}
        assert 0 < row["bytes of targets"] <= 0.35e9 * 2 / 256  # of 2 images
        waits = {name: sum(places.values()) for name, places in row["waits"].items()}
        assert waits == {"forward": 0, "backward": 0, "optimizer": int("fp16" in ds_config)}, row["waits"]
    assert "not counted: views" in found["text"]


def count_without_triton() -> dict[str, int]:
    from vitfreeze.bench import launches

    launches.find_obstacle = lambda cell_sizes: "Triton is not installed"
    result = launches.count_launches(load_config("paper", NARROW), frozen_layers=[0])
    assert "without a kernel of their own" in launches.format_launch_count(result)
    return dict(result.rows[0].targets.operations)


def test_without_triton_the_plain_version_is_counted() -> None:
    (operations,) = run_ranks(count_without_triton, world_size=1)
    assert sum(operations.values()) > 50
    assert not {"find_contrast", "scatter_add_"} & set(operations)


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


def waits_of_finetuning(folder: Path) -> dict[str, int]:
    import torch

    from vitfreeze.architecture import MODEL_SIZES
    from vitfreeze.bench.launches import PhaseCount, _HostCopies, _Launches
    from vitfreeze.data.finetuning import BatchMixing
    from vitfreeze.fault_tolerance import LossGuard
    from vitfreeze.model import Classifier
    from vitfreeze.report import Meter
    from vitfreeze.training.finetune import _seeded_drop_path

    model = Classifier(size=MODEL_SIZES["vit_tiny_test"], img_size=32, num_classes=5, drop_path=0.1, average_decay=0.99)
    mixing = BatchMixing(num_classes=5, mixup=0.8, cutmix=1.0, reprob=0.25)
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([1, 2, 3, 4])
    guard = LossGuard(folder, rank=0, max_skipped_steps=3, forgives_skipped=False)
    meter, phases = Meter(), [PhaseCount(), PhaseCount(), PhaseCount()]
    for step, phase in enumerate(
        phases
    ):  # mixup and cutmix take turns; the first step lays out what later ones keep on the device
        with _HostCopies(phase), _Launches(phase, PhaseCount()):
            mixed, targets = mixing.apply(images, labels, step=step)
            with _seeded_drop_path((0, step, 0, 0), device=torch.device("cpu")):
                output = model(mixed, targets=targets)
            output.loss.backward()
            model.update_average()
            meter.add_losses({"loss": output.loss})
            guard.add(step, keys=["sample"], losses={"loss": output.loss})
            guard.close_step(was_skipped=torch.zeros(()))
    assert phases[1].launches > 100
    return {**phases[1].waits, **phases[2].waits}


def test_finetuning_makes_the_host_wait_for_nothing(tmp_path: Path) -> None:
    """What a step of fine-tuning does beside the engine's, which is the same as in pre-training."""
    assert waits_of_finetuning(tmp_path) == {}
