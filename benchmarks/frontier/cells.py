"""One cell of the study: an arm with a seed, pre-trained, fine-tuned and probed by the commands of vitfreeze.

A cell's commands leave their results in its work folder one by one, so a killed study repeats at most one command, and
that one goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.frontier.arms import STOP_GRID, Arm
from benchmarks.frontier.costs import Planner, Stretch, count_cost
from benchmarks.frontier.errors import CellError, StoppedError
from benchmarks.frontier.files import read_json_lines, write_json
from benchmarks.frontier.sizes import Settings, Size
from benchmarks.frontier.split import Split

logger = logging.getLogger("frontier")

EXIT_STOPPED = 75
CURVE_POINTS = 50
KNN = 10


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured: one arm, one seed, one budget.

    Attributes:
        arm: what is pre-trained.
        seed: of weights, order, crops and masks, in pre-training and fine-tuning.
        budget: cost of the arm with share 1, in units of the plain run of the size's epochs.
        blr: learning rate of pre-training per 256 images.
        all_labels: whether fine-tuning sees all labels.
        final: whether the test set judges, not the held-out images.
    """

    arm: Arm
    seed: int
    budget: float
    blr: float
    all_labels: bool = False
    final: bool = False

    @property
    def run_name(self) -> str:
        """Name of the folder of its pre-training, which cells with the same pre-training share."""
        name = "plain" if self.arm.kind.stopped else self.arm.name
        return f"{name}_budget{self.budget:g}_blr{self.blr:g}_seed{self.seed}"

    @property
    def name(self) -> str:
        """Name of its file."""
        words = [f"{self.arm.name}_budget{self.budget:g}_blr{self.blr:g}_seed{self.seed}"]
        words += ["all"] if self.all_labels else []
        words += ["test"] if self.final else []
        return "_".join(words)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How many steps an arm takes, and what they cost.

    Attributes:
        steps: steps that are taken.
        planned_steps: steps that its schedule is made for; more than `steps` if it is stopped early.
        flops: operations of the steps taken.
        reference_flops: operations of the plain run of budget 1.
        finetuning_flops: operations of fine-tuning.
    """

    steps: int
    planned_steps: int
    flops: float
    reference_flops: float
    finetuning_flops: float


@dataclass(frozen=True, kw_only=True)
class Laboratory:
    """Where and with what the cells of a study are run.

    Attributes:
        size_name, size: model, lengths, labels.
        split: the images.
        out: work folder: runs/ and logs.
    """

    size_name: str
    size: Size
    split: Split
    out: Path

    # Commands ----------------------------------------------------------------------------------------------------

    def pretraining(self, cell: Cell) -> list[str]:
        """Return the settings of a cell's pre-training that say what it is; no paths, no length."""
        chosen = {**self.size.encoder, **self.size.pretraining, "optim.blr": f"{cell.blr:g}"}
        return [*as_overrides(chosen), f"run.seed={cell.seed}", "run.show_every=0"]

    def finetuning(self, cell: Cell) -> list[str]:
        """Return the settings of a cell's fine-tuning; no paths."""
        steps = self.size.all_labels_steps if cell.all_labels else self.size.finetuning_steps
        length = [f"run.length={steps} steps", f"eval.every={steps} steps", f"checkpoint.every={steps // 4} steps"]
        classes = f"finetune.num_classes={self.split.num_classes}"
        return [*as_overrides({**self.size.encoder, **self.size.finetuning}), *length, classes, f"run.seed={cell.seed}"]

    def planner(self, *, images: int | None = None) -> Planner:
        """Return what counts, for an epoch of this many images (default: the training images)."""
        return Planner(run=print_of, images=images or self.split.train)

    def lengths(self, cell: Cell) -> Lengths:
        """Solve for the length of the arm that spends its share of the budget."""
        planner, overrides = self.planner(), self.pretraining(cell)
        reference = count_cost(planner.stretches("off", [*overrides, f"run.length={self.size.steps} steps"]))
        budget = cell.budget * reference
        planned_flops = budget if cell.arm.kind.stopped else budget * cell.arm.share
        planned = planner.length_for(cell.arm.kind.recipe, overrides, planned_flops * (1 + 1e-12))
        steps = round(planned * cell.arm.share) if cell.arm.kind.stopped else planned
        stretches = planner.stretches(cell.arm.kind.recipe, [*overrides, f"run.length={planned} steps"])
        return Lengths(
            steps=steps, planned_steps=planned, flops=count_cost(stretches, stop_step=steps),
            reference_flops=reference, finetuning_flops=count_cost(self._finetuning_stretches(cell)),
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Return what all cells of the study share."""
        split = self.split
        counts = {"train": split.train, "held_out": split.held_out, "test": split.test, "classes": split.num_classes}
        return {"size": self.size_name, "data": split.name, "images": counts, "steps_of_plain": self.size.steps}

    def _finetuning_stretches(self, cell: Cell) -> tuple[Stretch, ...]:
        images = self.split.train if cell.all_labels else self.split.labelled
        return self.planner(images=images).stretches(self.size.recipe, [*self.finetuning(cell), "run.task=finetune"])

    # Running -----------------------------------------------------------------------------------------------------

    def run(self, cell: Cell) -> dict[str, Any]:
        """Do what of the cell is not done yet and return its record.

        Raises:
            CellError: a command failed.
            StoppedError: a command was asked to stop.
        """
        lengths = self.lengths(cell)
        run = self.out / "runs" / cell.run_name
        pretraining = self._pretrain(cell, run, lengths)
        weights = run / "pretrain"
        if cell.arm.kind.stopped:
            weights = weights / "checkpoints" / f"step-{lengths.steps:08d}"
            pretraining = {**pretraining, **summarize_training(run / "pretrain", until=lengths.steps)}
        finetuning = self._finetune(cell, run, weights)
        accuracies = {"finetuned": finetuning["top1"], **self._probe(cell, run, weights)}
        return make_record(
            cell, study=self.describe(), lengths=lengths, pretraining=pretraining, finetuning=finetuning, accuracies=accuracies,
            overrides={"pretraining": self.pretraining(cell), "finetuning": self.finetuning(cell)},
            recipes={"pretraining": cell.arm.kind.recipe, "finetuning": self.size.recipe},
            labels=self.split.train if cell.all_labels else self.split.labelled,
        )  # fmt: skip

    def try_rate(self, cell: Cell) -> float:
        """Pre-train with a learning rate that is tried out; return what a linear probe on few images makes of it."""
        run = self.out / "tuning" / cell.run_name
        self._pretrain(cell, run, self.lengths(cell))
        shards = {part: json.loads(self.split.shards(part)) for part in ("train", "held_out")}
        command = [
            "linear", str(run / "pretrain"), "--train", *shards["train"], "--val", *shards["held_out"],
            "--limit", str(self.split.held_out), "--workers", self.size.pretraining["data.workers"], *self.size.linear,
        ]  # fmt: skip
        return self._do_once(run / "linear.json", command, read_linear)["top1"]

    def _pretrain(self, cell: Cell, run: Path, lengths: Lengths) -> dict[str, Any]:
        overrides = [
            *self.pretraining(cell), f"run.length={lengths.planned_steps} steps",
            f"checkpoint.every={1 / STOP_GRID:g}", f"checkpoint.keep={STOP_GRID}",
            f"data.train={self.split.shards('train')}", f"run.dir={run / 'pretrain'}",
        ]  # fmt: skip
        command = ["pretrain", cell.arm.kind.recipe, *overrides]
        return self._do_once(run / "pretrain.json", command, lambda _: summarize_training(run / "pretrain"))

    def _finetune(self, cell: Cell, run: Path, weights: Path) -> dict[str, Any]:
        name = "finetune" + cell.name.removeprefix(cell.arm.name).partition(f"seed{cell.seed}")[2]
        name += f"_{cell.arm.name}" if cell.arm.kind.stopped else ""
        overrides = [
            *self.finetuning(cell), f"model.init_from={weights}", f"run.dir={run / name}",
            f"data.train={self.split.shards('train' if cell.all_labels else 'labelled')}",
            f"data.val={self.split.shards(judge_of(cell))}",
        ]  # fmt: skip
        command = ["finetune", self.size.recipe, *overrides]

        def read(_: str) -> dict[str, Any]:
            last = read_json_lines(run / name / "metrics.jsonl")[-1]
            return {**summarize_training(run / name), "top1": last["eval"]["top1"]}

        return self._do_once(run / f"{name}.json", command, read)

    def _probe(self, cell: Cell, run: Path, weights: Path) -> dict[str, float]:
        place = f"_{cell.arm.name}" if cell.arm.kind.stopped else ""
        train = ["--train", *json.loads(self.split.shards("train"))]
        workers = ["--workers", self.size.pretraining["data.workers"]]

        def linear(judge: str, *options: str) -> dict[str, Any]:
            val = ["--val", *json.loads(self.split.shards(judge))]
            command = ["linear", str(weights), *train, *val, *workers, *self.size.linear, *options]
            return self._do_once(run / f"linear_{judge}{place}.json", command, read_linear)

        found = linear("held_out")
        if cell.final:  # the rate of the probe was chosen on the held-out images
            found = linear("test", "--blr", f"{found['blr']:g}")
        val = ["--val", *json.loads(self.split.shards(judge_of(cell)))]
        command = ["knn", str(weights), *train, *val, *workers, "--k", str(KNN)]
        knn = self._do_once(run / f"knn_{judge_of(cell)}{place}.json", command, read_knn)
        return {"linear": found["top1"], f"knn_{KNN}": knn["top1"]}

    def _do_once(self, marker: Path, command: Sequence[str], read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        """Run a command, unless its result is there; return the result with the CPU time of one undisturbed run."""
        if marker.is_file():
            return json.loads(marker.read_text())
        attempts = marker.with_suffix(".attempts")
        marker.parent.mkdir(parents=True, exist_ok=True)
        resumed = attempts.exists()
        attempts.touch()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        printed = run_command(command, log=marker.with_suffix(".log"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result = {**read(printed), "cpu_seconds": None if resumed else round(seconds, 1)}
        write_json(result, marker)
        return result


def as_overrides(chosen: Settings) -> list[str]:
    """Return settings as the command line takes them."""
    return [f"{key}={json.dumps(value) if value == '' else value}" for key, value in chosen.items()]


def judge_of(cell: Cell) -> str:
    """Return the part of the images that judges a cell."""
    return "test" if cell.final else "held_out"


def print_of(arguments: Sequence[str]) -> str:
    """Run a short command of vitfreeze and return what it prints; raises CellError."""
    done = subprocess.run([sys.executable, "-m", "vitfreeze", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CellError(f"vitfreeze {arguments[0]} failed: {last_line(done.stderr)}")
    return done.stdout


def run_command(arguments: Sequence[str], *, log: Path) -> str:
    """Run a long command of vitfreeze, its messages appended to `log`; return what it prints.

    Raises:
        CellError: it failed.
        StoppedError: it was asked to stop, and has saved.
    """
    with log.open("a") as messages:
        command = [sys.executable, "-m", "vitfreeze", *arguments]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=messages, text=True)
        except KeyboardInterrupt:
            raise StoppedError(f"vitfreeze {arguments[0]} was interrupted") from None
    if done.returncode == EXIT_STOPPED:
        raise StoppedError(f"vitfreeze {arguments[0]} was asked to stop")
    if done.returncode:
        raise CellError(f"vitfreeze {arguments[0]} failed ({done.returncode}): {last_line(log.read_text())}; see {log}")
    return done.stdout


def last_line(text: str) -> str:
    """Return the last line of a text that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def read_linear(printed: str) -> dict[str, float]:
    """Read what `vitfreeze linear` prints: the classifier that it marks as best."""
    best = next(line.split() for line in printed.splitlines() if line.endswith("best"))
    return {"blr": float(best[1]), "top1": float(best[2].rstrip("%")) / 100}


def read_knn(printed: str) -> dict[str, float]:
    """Read what `vitfreeze knn` prints for one number of neighbours."""
    return {"top1": float(printed.split()[-1].rstrip("%")) / 100}


def summarize_training(run: Path, *, until: int | None = None) -> dict[str, Any]:
    """Return the steps of a run, the seconds that they took, and its curve with few points.

    After a resume a step may be logged twice; the later line counts.
    """
    lines = {line["step"]: line for line in read_json_lines(run / "metrics.jsonl")}
    steps = sorted(step for step in lines if until is None or step <= until)
    seconds = sum(
        (step - before) * lines[step]["step_seconds"] for before, step in zip([0, *steps], steps, strict=False)
    )
    kept = steps[:: max(1, len(steps) // CURVE_POINTS)]
    kept += [steps[-1]] if kept[-1] != steps[-1] else []
    curve = {"step": kept, "loss": [round(lines[step]["loss"], 5) for step in kept]}
    curve["frozen_layers"] = [lines[step]["frozen_layers"] for step in kept]
    return {"steps": steps[-1], "seconds": round(seconds, 1), "curve": curve}


def make_record(
    cell: Cell,
    *,
    study: Mapping[str, Any],
    lengths: Lengths,
    pretraining: Mapping[str, Any],
    finetuning: Mapping[str, Any],
    accuracies: Mapping[str, float],
    overrides: Mapping[str, Sequence[str]],
    recipes: Mapping[str, str],
    labels: int,
) -> dict[str, Any]:
    """Return all that is published of a cell; it holds no path of this machine."""
    whole = lengths.reference_flops + lengths.finetuning_flops
    return {
        **study, "arm": cell.arm.name, "words": cell.arm.words, "budget": cell.budget, "seed": cell.seed, "blr": cell.blr,
        "labels": labels, "judged_on": judge_of(cell), "accuracy": dict(accuracies),
        "cost": {
            "pretraining_flops": lengths.flops, "finetuning_flops": lengths.finetuning_flops,
            "pretraining": lengths.flops / lengths.reference_flops,
            "with_finetuning": (lengths.flops + lengths.finetuning_flops) / whole,
        },
        "seconds": {
            "pretraining": pretraining["seconds"], "finetuning": finetuning["seconds"],
            "pretraining_cpu": None if cell.arm.kind.stopped else pretraining["cpu_seconds"],
            "finetuning_cpu": finetuning["cpu_seconds"],
        },
        "pretraining": {
            "recipe": recipes["pretraining"], "overrides": list(overrides["pretraining"]), "steps": lengths.steps,
            "planned_steps": lengths.planned_steps, "curve": pretraining["curve"],
        },
        "finetuning": {
            "recipe": recipes["finetuning"], "overrides": list(overrides["finetuning"]), "steps": finetuning["steps"],
            "curve": finetuning["curve"],
        },
        "versions": read_versions(), "device": describe_device(),
    }  # fmt: skip


def read_versions() -> dict[str, str]:
    """Return the versions of what computes."""
    from importlib.metadata import version

    from vitfreeze import __version__

    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "vitfreeze": __version__,
        "python": python,
        **{name: version(name) for name in ("torch", "deepspeed", "timm")},
    }


def describe_device() -> str:
    """Return the GPU or, without one, the processor and the threads that a process may use."""
    import torch

    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{model.group(1) if model else 'CPU'}, {torch.get_num_threads()} threads"
