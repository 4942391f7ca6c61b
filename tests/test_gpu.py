"""What only a GPU can show; each scenario is rehearsed on the CPU, so that it runs at once where there is one."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from processes import run_ranks

from vitfreeze.config import load_config

NARROW = ("model.embed_dim=48", "model.num_heads=3", "model.decoder_embed_dim=32", "model.decoder_num_heads=2")
FROZEN_LAYERS = (0, 6, 12)


def steps_without_waiting(ds_config: str) -> list[float]:
    """Take steps at several frozen lengths; on a GPU, whatever makes the host wait for it raises."""
    from vitfreeze.bench.timing import start_engine

    config = load_config("paper", (*NARROW, f"run.ds_config={ds_config}"))
    config = replace(config, batch=replace(config.batch, global_size=2, micro_size=2))
    engine, images = start_engine(config, rounds=1)
    losses = []
    for frozen_layers in FROZEN_LAYERS:
        engine.freeze(frozen_layers, step=frozen_layers)
        noise = torch.rand(len(images), engine.module.num_patches, device=images.device)
        for is_watched in (False, True):  # the first step fills caches, which may wait
            with waiting_refused() if is_watched else contextlib.nullcontext():
                loss = engine(images, noise=noise).loss
                engine.backward(loss)
                engine.step()
        losses.append(float(loss))
    return losses


@contextlib.contextmanager
def waiting_refused():  # type: ignore[no-untyped-def]
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.distributed
def test_rehearsal_on_the_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: pytest -m gpu runs the scenario itself")
    (losses,) = run_ranks(steps_without_waiting, "zero1_bf16", world_size=1)
    assert len(losses) == len(FROZEN_LAYERS)
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: that a step never waits was NOT shown")
@pytest.mark.parametrize("ds_config", ["zero1_bf16", "zero2_bf16"])  # fp16 reads its loss scale at every step
def test_a_step_never_makes_the_host_wait(ds_config: str) -> None:
    (losses,) = run_ranks(steps_without_waiting, ds_config, world_size=1)
    assert all(0 < loss < 10 for loss in losses)
