"""Records of cells: read from what the commands print and write, kept as small JSON files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.frontier.cells import Cell
from benchmarks.frontier.files import read_json_lines
from benchmarks.frontier.study import Lengths, Study

CURVE_POINTS = 50
ROOT = Path(__file__).resolve().parents[2]


def read_linear(printed: str) -> dict[str, float]:
    """Read what `vitfreeze linear` prints: the classifier that it marks as best."""
    best = next(line.split() for line in printed.splitlines() if line.endswith("best"))
    return {"blr": float(best[1]), "top1": _share(best[2])}


def read_knn(printed: str) -> dict[str, float]:
    """Read what `vitfreeze knn` prints for one number of neighbours."""
    return {"top1": _share(printed.split()[-1])}


def _share(percent: str) -> float:
    return round(float(percent.rstrip("%")) / 100, 6)


def summarize_training(run: Path, *, until: int | None = None) -> dict[str, Any]:
    """Return the steps of a run, the seconds that they took, and its curve with few points.

    After a resume a step may be logged twice; the later line counts. `until` leaves out the steps after it.
    """
    lines = {line["step"]: line for line in read_json_lines(run / "metrics.jsonl")}
    steps = sorted(step for step in lines if until is None or step <= until)
    befores = [0, *steps[:-1]]
    seconds = sum((step - before) * lines[step]["step_seconds"] for before, step in zip(befores, steps, strict=True))
    kept = steps[:: -(-len(steps) // CURVE_POINTS)]
    kept += [steps[-1]] if kept[-1] != steps[-1] else []
    curve = {
        "step": kept,
        "loss": [round(lines[step]["loss"], 5) for step in kept],
        "frozen_layers": [lines[step]["frozen_layers"] for step in kept],
    }
    return {"steps": steps[-1], "seconds": round(seconds, 1), "curve": curve}


def make_record(
    cell: Cell,
    *,
    study: Study,
    lengths: Lengths,
    pretraining: Mapping[str, Any],
    finetuning: Mapping[str, Any],
    accuracies: Mapping[str, float],
) -> dict[str, Any]:
    """Return all that is published of a cell; it holds no path of this machine.

    Costs are in units of the plain run of budget 1, alone and together with its fine-tuning.
    """
    return {
        **study.describe(), "arm": cell.arm.name, "words": cell.arm.words, "budget": cell.budget, "seed": cell.seed,
        "blr": cell.blr, "labels": getattr(study.split, cell.labelled_part), "judged_on": cell.judge,
        "accuracy": dict(accuracies), "cost": _costs(lengths),
        "seconds": {
            f"{task}{suffix}": result[key]
            for task, result in (("pretraining", pretraining), ("finetuning", finetuning))
            for suffix, key in (("", "seconds"), ("_cpu", "cpu_seconds"))
        },
        "pretraining": {
            "recipe": cell.arm.kind.recipe, "overrides": study.pretraining_settings(cell), "steps": lengths.steps,
            "planned_steps": lengths.planned_steps, "curve": pretraining["curve"],
        },
        "finetuning": {
            "recipe": study.size.recipe, "overrides": study.finetuning_settings(cell), "steps": finetuning["steps"],
            "curve": finetuning["curve"],
        },
        "versions": read_versions(), "device": describe_device(),
    }  # fmt: skip


def _costs(lengths: Lengths) -> dict[str, float]:
    whole = lengths.reference_flops + lengths.finetuning_flops
    return {
        "pretraining_flops": lengths.flops,
        "finetuning_flops": lengths.finetuning_flops,
        "pretraining": lengths.flops / lengths.reference_flops,
        "with_finetuning": (lengths.flops + lengths.finetuning_flops) / whole,
    }


def read_versions() -> dict[str, str]:
    """Return the versions of what computes; of a checkout, its commit too."""
    from vitfreeze import __version__

    found = {"vitfreeze": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    found |= {name: version(name) for name in ("torch", "deepspeed", "timm")}
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found if git.returncode else {**found, "commit": git.stdout.strip()}


def describe_device() -> str:
    """Return the GPU or, without one, the processor and the threads that a process uses."""
    import torch

    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{processor.group(1) if processor else 'CPU'}, threads: {torch.get_num_threads()}"
