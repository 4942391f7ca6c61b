"""torch.compile under DeepSpeed: graphs without breaks, and never so many that blocks go on uncompiled in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_ranks

from vitfreeze.config import load_config

pytestmark = pytest.mark.distributed
SETTINGS = (
    *("model.size=vit_tiny_test", "model.img_size=32", "model.depth=5", "batch.global_size=8", "batch.micro_size=2"),
    *("run.ds_config=cpu", "freeze.min_steps_between_drops=0"),
)
MICRO_BATCHES = ((2, 4), (4, 2), (8, 1))  # images, and how many make a step: as micro-batches grow
SIDES = (32, 48)  # of a curriculum


def train_in_every_way() -> dict[str, Any]:
    """Take steps at every frozen length, micro-batch and side, with probes and pictures between; losses beside plain.

    `fullgraph` raises at a graph break, and also where torch refuses to compile more.
    """
    from vitfreeze.engine import join_ranks
    from vitfreeze.training.build import build_engine, build_model

    config = load_config("paper", SETTINGS)
    plain, model = build_model(config), build_model(config)
    model.compile_parts(backend="aot_eager", fullgraph=True)  # inductor's graphs, without minutes of C++
    engine = build_engine(config, join_ranks(), frozen_layers=0, model=model)
    engine.set_learning_rates(dict.fromkeys(engine.unit_names, 0.0))
    counters = torch._dynamo.utils.counters
    graphs, losses = [], []
    for frozen_layers in range(model.depth + 1):
        engine.freeze(frozen_layers, step=frozen_layers)
        for (micro_batch, accumulation), side in zip(MICRO_BATCHES, (*SIDES, SIDES[0]), strict=True):
            engine.set_micro_batch(micro_batch, accumulation=accumulation)
            images = torch.randn(micro_batch, 3, side, side)
            noise = torch.rand(micro_batch, (side // 8) ** 2)
            for _ in range(accumulation):
                loss = engine(images, noise=noise).loss
                engine.backward(loss)
                engine.step()
            losses.append((float(loss), float(plain(images, noise=noise, frozen_layers=frozen_layers).loss)))
            before = counters["stats"]["unique_graphs"]
            model.eval()
            with torch.no_grad():
                model.encode(torch.randn(3, 3, 32, 32))
                model.predict(torch.randn(3, 3, 32, 32), frozen_layers=frozen_layers)
            model.train()
            assert counters["stats"]["unique_graphs"] == before, "probes and pictures compile nothing"
        graphs.append(before)
    return {"graphs": graphs, "breaks": dict(counters["graph_break"]), "losses": losses}


def test_every_frozen_length_shape_probe_and_picture_without_a_break_or_a_limit() -> None:
    (found,) = run_ranks(train_in_every_way, world_size=1)
    assert found["breaks"] == {}
    for compiled, plain in found["losses"]:
        assert compiled == pytest.approx(plain, rel=1e-4)
    # With 1 layer frozen the first block's input needs no gradient, with 2 a block is frozen; nothing new after that.
    graphs = found["graphs"]
    assert 0 < graphs[0] < graphs[1] < graphs[2] == graphs[-1]


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def exceed() -> str:
    from vitfreeze.model import compiled

    compiled.MOST_GRAPHS, layer = 2, Double()  # an older torch keeps its own 8, if that is more
    compiled.compile_each([layer], backend="eager", fullgraph=True)
    try:
        for size in range(1, 12):
            layer(torch.randn(size, 4))
    except Exception as error:
        return type(error).__name__
    return ""


def test_a_limit_that_is_hit_would_be_seen() -> None:
    assert run_ranks(exceed, world_size=1) != [""]
