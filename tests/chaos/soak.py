"""Takes many tiny steps over many drops of layers, and watches whether anything of the process grows.

    python tests/chaos/soak.py --steps 20000 --folder /tmp/soak

Everything is real: shards, data workers, engine, drops, saves; only the model is tiny. A layer that has left gives
memory, groups and hooks back, so every figure may fall from drop to drop, and none may rise.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"depth": 12, "embed_dim": 24, "decoder_embed_dim": 16},
    "data": {"workers": 1},
    "batch": {"global_size": 2, "micro_size": 2},
    "freeze": {"t_0": 0.05},  # the drops are spread over the whole run
    "run": {"log_every_steps": 200},
    "checkpoint": {"every": "500 steps"},
}


def soak(folder: Path, *, steps: int, every: int) -> list[dict[str, int]]:
    """Run, and return what the process held after every `every` steps."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import psutil
    import torch
    from jobs import Bench

    from vitfreeze.config import load_config
    from vitfreeze.fault_tolerance import RunGuard
    from vitfreeze.training.pretrain import pretrain

    bench = Bench(folder, **SETTINGS)
    config = load_config(bench.recipe, [f"run.dir={folder / 'run'}", f"run.length={steps} steps"])
    process, samples, end_step = psutil.Process(), list[dict[str, int]](), RunGuard.end_step

    def count_hooks(model: torch.nn.Module) -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooks = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
        kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
        return hooks + sum(len(getattr(weight, kind) or ()) for weight in model.parameters() for kind in kinds)

    def sampling_end_step(self: RunGuard, done: int) -> bool:
        stops = end_step(self, done)
        if done % every == 0:
            gc.collect()
            samples.append(
                {
                    "step": done,
                    "frozen_layers": self.engine.frozen_layers,
                    "rss_kib": process.memory_info().rss // 1024,
                    "file_handles": process.num_fds(),
                    "threads": process.num_threads(),
                    "children": len(process.children(recursive=True)),
                    "hooks": count_hooks(self.engine.module),
                    "objects": len(gc.get_objects()),
                }
            )
            print(json.dumps(samples[-1]), flush=True)
        return stops

    RunGuard.end_step = sampling_end_step  # type: ignore[method-assign]
    try:
        status = pretrain(config)
    finally:
        RunGuard.end_step = end_step  # type: ignore[method-assign]
    assert status == 0, f"exit status {status}"
    return samples


def growth(samples: list[dict[str, int]]) -> dict[str, tuple[int, int]]:
    """Return (figure at the first sample after warming up, largest figure in the last quarter) of everything."""
    first, last = samples[max(1, len(samples) // 10)], samples[-max(1, len(samples) // 4) :]
    return {name: (first[name], max(sample[name] for sample in last)) for name in first if name != "step"}


def main() -> None:
    """Soak, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    print(json.dumps(growth(soak(options.folder, steps=options.steps, every=max(options.steps // 80, 1)))))


if __name__ == "__main__":
    main()
