"""Cells of the authors' code, beside the engine on the same batch.

The folder is that of their `models_mim.py` (ViT/ in utkutpcgl/ViTFreeze), whose imports must be installed. Their step
is theirs: autocast to fp16 with a scaled loss, AdamW without those of the frozen layers, and a look at the loss.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitfreeze.bench.gpu.cells import FROZEN_LAYERS, REPEATS, Cell, Trial, open_stepper, tell
from vitfreeze.bench.timing import LEARNING_RATE, time_call
from vitfreeze.config import Config
from vitfreeze.data import normalize


def measure_reference(trial: Trial, *, folder: Path) -> Iterator[Cell]:
    """Yield a cell for every frozen length: both steps in turn, and their ratio.

    Raises:
        FileNotFoundError: there is no `models_mim.py` in the folder.
        ImportError: what it imports is not installed.
    """
    config = trial.configure()
    depth, model = config.model.resolve().depth, load_reference(folder, config)
    with open_stepper(config, images=trial.images) as stepper:
        device = stepper.engine.device
        images = normalize(stepper.bytes_BCHW, colours=config.data.colours)
        model.to(device)
        for k in sorted({min(k, depth) for k in FROZEN_LAYERS}):
            stepper.engine.freeze(k, step=k)
            theirs = _Step(model, images, frozen_layers=k, mask_ratio=config.model.mask_ratio)
            theirs.take()  # the first of each fills caches
            stepper.take()
            ours_s, theirs_s = list[float](), list[float]()
            for _ in range(REPEATS):
                ours_s.append(stepper.time_run(trial.rounds) / trial.rounds)
                theirs_s.append(time_call(partial(theirs.take, trial.rounds), device=device) / trial.rounds)
            yield tell(
                "authors' code",
                f"{trial.models[0]}, {k} frozen",
                ours_ms=1e3 * statistics.median(ours_s),
                theirs_ms=1e3 * statistics.median(theirs_s),
                ratio=statistics.median(x / y for x, y in zip(ours_s, theirs_s, strict=True)),
            )


def load_reference(folder: Path, config: Config) -> nn.Module:
    """Import the authors' model of the recipe's size from their folder, which is on the path only meanwhile."""
    if not (folder / "models_mim.py").is_file():
        raise FileNotFoundError(f"no file {folder / 'models_mim.py'}")
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        build = getattr(importlib.import_module("models_mim"), f"MIM_{config.model.size}")
        freeze = config.freeze
        with contextlib.redirect_stdout(io.StringIO()):  # stdout is for findings
            model: nn.Module = build(
                img_size=config.model.img_size,
                hog_nbins=config.model.hog_nbins,
                hog_bias=config.model.hog_bias,
                how_scale=freeze.how,
                t_0=freeze.t_0,
                scale_lr=freeze.scale_lr,
            )
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            if name.partition(".")[0] in ("models_mim", "util"):
                del sys.modules[name]
    return model


class _Step:
    """Their training step with so many layers frozen."""

    def __init__(self, model: nn.Module, images: Tensor, *, frozen_layers: int, mask_ratio: float) -> None:
        self.model, self.images, self.frozen_layers, self.mask_ratio = model, images, frozen_layers, mask_ratio
        trained = []
        for _, parameter in model.named_parameters():  # which tells every parameter its layer
            if (layer := getattr(parameter, "layer_index", None)) is not None and layer < frozen_layers:
                parameter.requires_grad_(False)
            elif parameter.requires_grad:
                trained.append(parameter)
        self.on_gpu = images.device.type == "cuda"
        self.adamw = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95))
        self.scaler: Any = torch.amp.GradScaler(images.device.type, enabled=self.on_gpu)

    def take(self, rounds: int = 1) -> None:
        """Take so many steps; they look at the loss in each, for which the host waits."""
        for _ in range(rounds):
            with torch.autocast(self.images.device.type, dtype=torch.float16, enabled=self.on_gpu):
                loss = self.model(self.images, min_active_layer_index=self.frozen_layers, mask_ratio=self.mask_ratio)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the authors' loss is {loss.item()}")
            self.scaler.scale(loss).backward()
            self.scaler.step(self.adamw)
            self.scaler.update()
            self.adamw.zero_grad()
