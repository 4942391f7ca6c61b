"""Cells, run: every command leaves its result behind, so that a killed study repeats at most one of them.

That one goes on from its newest checkpoint.
"""

from __future__ import annotations

import functools
import json
import logging
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.frontier.arms import Arm, parse_arm
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.errors import CellError, StoppedError
from benchmarks.frontier.files import read_json_lines, write_json
from benchmarks.frontier.records import make_record, read_knn, read_linear, summarize_training
from benchmarks.frontier.study import NEIGHBOURS, Study

logger = logging.getLogger("frontier")

EXIT_STOPPED = 75
TUNING_SEED = 1000  # no cell has it


def run_cells(study: Study, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Run what is not done yet of the cells and return all records; the log says how long the rest will take.

    Raises:
        CellError: a command failed.
        StoppedError: a command was asked to stop.
    """
    paths = {cell: study.out / "cells" / f"{cell.name}.json" for cell in cells}
    work = estimate_work(study, [cell for cell in cells if not paths[cell].is_file()])
    begin, whole = time.monotonic(), sum(work.values())
    for number, cell in enumerate(work, start=1):
        logger.info("cell %d of %d: %s, seed %d", number, len(work), cell.arm.name, cell.seed)
        write_json(run_cell(study, cell), paths[cell])
        work[cell] = 0.0
        left = sum(work.values())
        seconds = (time.monotonic() - begin) / (whole - left) * left
        logger.info("done: %s; about %s left", paths[cell].name, format_duration(seconds))
    return [json.loads(path.read_text()) for path in paths.values()]


def estimate_work(study: Study, cells: Sequence[Cell]) -> dict[Cell, float]:
    """Return the work of each cell, in units of the plain run: what is left of training."""
    work: dict[Cell, float] = {}
    trained: set[str] = set()
    for cell in cells:
        lengths = study.lengths(cell)
        is_trained = cell.run_name in trained or (study.out / "runs" / cell.run_name / "pretrain.json").is_file()
        trained.add(cell.run_name)
        pretraining = 0 if is_trained else lengths.flops * lengths.planned_steps / lengths.steps
        work[cell] = (pretraining + lengths.finetuning_flops) / lengths.reference_flops
    return work


def format_duration(seconds: float) -> str:
    """Return a duration in hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def run_cell(study: Study, cell: Cell) -> dict[str, Any]:
    """Do what of a cell is not done yet and return its record; raises as `run_cells`."""
    lengths, run = study.lengths(cell), study.out / "runs" / cell.run_name
    weights = study.weights(cell, run, lengths)
    pretraining = do_once(
        run / "pretrain.json", study.pretrain(cell, run, lengths), lambda _: summarize_training(run / "pretrain")
    )
    if cell.arm.kind.stopped:
        stopped = summarize_training(run / "pretrain", until=lengths.steps)
        pretraining = {**pretraining, **stopped, "cpu_seconds": None}
    finetuning = _finetune(study, cell, run, weights)
    return make_record(
        cell, study=study, lengths=lengths, pretraining=pretraining, finetuning=finetuning,
        accuracies={"finetuned": finetuning["top1"], **_probe(study, cell, run, weights)},
    )  # fmt: skip


def _finetune(study: Study, cell: Cell, run: Path, weights: Path) -> dict[str, Any]:
    folder = run / cell.finetuning_name

    def read(_: str) -> dict[str, Any]:
        last = read_json_lines(folder / "metrics.jsonl")[-1]
        return {**summarize_training(folder), "top1": last["eval"]["top1"]}

    return do_once(run / f"{folder.name}.json", study.finetune(cell, run, weights), read)


def _probe(study: Study, cell: Cell, run: Path, weights: Path) -> dict[str, float]:
    """Return the accuracies of the linear probe and of k-NN; the probe's rate is chosen on the held-out images."""
    suffix = cell.stop_suffix
    linear = do_once(run / f"linear_held_out{suffix}.json", study.linear(weights, "held_out"), read_linear)
    if cell.final:
        command = [*study.linear(weights, "test"), "--blr", f"{linear['blr']:g}"]
        linear = do_once(run / f"linear_test{suffix}.json", command, read_linear)
    knn = do_once(run / f"knn_{cell.judge}{suffix}.json", study.knn(weights, cell.judge), read_knn)
    return {"linear": linear["top1"], f"knn_{NEIGHBOURS}": knn["top1"]}


def tune(study: Study, arms: Sequence[Arm], *, rates: Sequence[float], budget: float) -> dict[str, float]:
    """Try learning rates out on short runs, the same for every kind that is tuned; return the best of each kind.

    A linear probe judges, on the held-out images. What was found is in tuning.json.
    """
    found: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(arm.kind.tuned_as for arm in arms):
        found[kind] = {}
        for rate in rates:
            cell = Cell(arm=parse_arm(kind), seed=TUNING_SEED, budget=budget, blr=rate)
            found[kind][f"{rate:g}"] = _try_rate(study, cell)
            write_json({"budget": budget, "seed": TUNING_SEED, "linear": found}, study.out / "tuning.json")
    best = {kind: max(rates, key=lambda rate: tried[f"{rate:g}"]) for kind, tried in found.items()}
    logger.info("learning rates per 256 images: %s", ", ".join(f"{kind} {rate:g}" for kind, rate in best.items()))
    return best


def _try_rate(study: Study, cell: Cell) -> float:
    run = study.out / "tuning" / cell.run_name
    command = study.pretrain(cell, run, study.lengths(cell))
    do_once(run / "pretrain.json", command, lambda _: summarize_training(run / "pretrain"))
    return do_once(run / "linear.json", study.linear(run / "pretrain", "held_out"), read_linear)["top1"]


def do_once(marker: Path, command: Sequence[str], read: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """Run a command unless its result is there; return the result.

    Args:
        marker: where the result is kept, as JSON; the command's messages go to the same name with .log.
        command: arguments of vitfreeze.
        read: makes the result of what the command prints.

    Returns:
        the result, with `cpu_seconds` of the command and its workers: null if a try before was cut short.
    """
    if marker.is_file():
        return json.loads(marker.read_text())
    begun = marker.with_suffix(".attempts")
    marker.parent.mkdir(parents=True, exist_ok=True)
    cut_short = begun.exists()
    begun.touch()
    before = _cpu_seconds()
    printed = run_command(command, log=marker.with_suffix(".log"))
    result = {**read(printed), "cpu_seconds": None if cut_short else round(_cpu_seconds() - before, 1)}
    write_json(result, marker)
    return result


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@functools.cache
def ask(arguments: tuple[str, ...]) -> str:
    """Run a short command of vitfreeze that always prints the same, and return that; raises CellError."""
    done = subprocess.run([sys.executable, "-m", "vitfreeze", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CellError(f"vitfreeze {arguments[0]} failed: {_last_line(done.stderr)}")
    return done.stdout


def run_command(arguments: Sequence[str], *, log: Path) -> str:
    """Run a long command of vitfreeze; return what it prints, which is left beside `log` as .out.

    Args:
        arguments: the command.
        log: where its messages are appended.

    Raises:
        CellError: it failed.
        StoppedError: it was asked to stop, or this process was: Ctrl-C reaches both, SIGTERM is passed on.
    """
    command, out = [sys.executable, "-m", "vitfreeze", *arguments], log.with_suffix(".out")
    with log.open("a") as messages, out.open("w") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=messages)
        status, was_stopped = wait_for(process)
    if was_stopped or status == EXIT_STOPPED:
        raise StoppedError(f"vitfreeze {arguments[0]} was asked to stop")
    if status:
        said = _last_line(log.read_text())
        raise CellError(f"vitfreeze {arguments[0]} ended with status {status}: {said} (all of it in {log})")
    return out.read_text()


def wait_for(process: subprocess.Popen[bytes]) -> tuple[int, bool]:
    """Wait for a command that may have to save first; return its status and whether it was asked to stop from here."""
    was_stopped = False

    def pass_on(signum: int, _: FrameType | None) -> None:
        nonlocal was_stopped
        was_stopped = True
        process.send_signal(signum)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        while True:
            try:
                return process.wait(), was_stopped
            except KeyboardInterrupt:
                was_stopped = True
    finally:
        signal.signal(signal.SIGTERM, before)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
