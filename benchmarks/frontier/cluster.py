"""The study as commands for a cluster, with planned hours: written down, not run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.frontier.cells import Cell
from benchmarks.frontier.costs import SECONDS_PER_HOUR
from benchmarks.frontier.split import Split
from benchmarks.frontier.study import Study

LAUNCHER = ("bash", "launch/local.sh")  # launch/README.md has those of several nodes and of SLURM
HEADER = """#!/usr/bin/env bash
# {count} cells of the study. Hours are those of one GPU at {teraflops:g} TFLOP/s: planned from counted operations,
# not measured. Every line goes on from its newest checkpoint when it is given again.
# The images first: python -m benchmarks.frontier --data DIR --out {out} --size {size} --prepare-only
set -euo pipefail
"""


def describe_imagenet(out: Path, *, held_out: int) -> Split:
    """Return ImageNet-1K's split, before anything is packed."""
    train = 1_281_167 - held_out
    return Split(
        folder=out, name="imagenet1k", train=train, labelled=train, held_out=held_out, test=50_000, num_classes=1000
    )


def write_commands(study: Study, cells: Sequence[Cell]) -> str:
    """Return a shell script with the commands of every cell, each cell under its planned hours."""
    teraflops = study.size.teraflops
    assert teraflops is not None
    lines = [HEADER.format(count=len(cells), teraflops=teraflops, out=study.out, size=study.size_name)]
    whole, seen = 0.0, set()
    for cell in cells:
        lengths, run = study.lengths(cell), study.out / "runs" / cell.run_name
        is_new = cell.run_name not in seen
        seen.add(cell.run_name)
        pretraining = lengths.flops * lengths.planned_steps / lengths.steps if is_new else 0.0
        hours = [flops / (teraflops * 1e12) / SECONDS_PER_HOUR for flops in (pretraining, lengths.finetuning_flops)]
        whole += sum(hours)
        lines.append(
            f"# {cell.arm.name}, seed {cell.seed}: {lengths.steps} steps, "
            f"{lengths.flops / lengths.reference_flops:.3f} of the plain run; {hours[0]:.1f} hours of pre-training, "
            f"{hours[1]:.1f} of fine-tuning"
        )
        commands = _commands(study, cell, run, pretrains=is_new)
        lines += [shlex.join([*LAUNCHER, *command]) for command in commands]
    lines.append(f"# in all {whole:.0f} hours of one GPU, planned")
    return "\n".join(lines) + "\n"


def _commands(study: Study, cell: Cell, run: Path, *, pretrains: bool) -> Iterator[list[str]]:
    lengths = study.lengths(cell)
    weights = study.weights(cell, run, lengths)
    if pretrains:
        yield study.pretrain(cell, run, lengths)
    yield study.finetune(cell, run, weights)
    yield study.linear(weights, cell.judge)
    yield study.knn(weights, cell.judge)
