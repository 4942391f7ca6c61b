"""What the commands of a cell are and what they cost, before any of them is run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.frontier.arms import STOP_GRID, parse_arm
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.costs import Planner, Run, Stretch, count_cost
from benchmarks.frontier.errors import InputError
from benchmarks.frontier.sizes import Settings, Size
from benchmarks.frontier.split import Split

NEIGHBOURS = 10


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
class Study:
    """What all cells share.

    Attributes:
        size_name, size: model, lengths, labels.
        split: the images.
        out: work folder.
        ask: how a short command of vitfreeze is run: its arguments to what it prints.
    """

    size_name: str
    size: Size
    split: Split
    out: Path
    ask: Run

    def describe(self) -> dict[str, Any]:
        """Return what the record of every cell says of the study."""
        split = self.split
        counts = {"train": split.train, "held_out": split.held_out, "test": split.test, "classes": split.num_classes}
        return {"size": self.size_name, "data": split.name, "images": counts, "steps_of_plain": self.size.steps}

    # Settings: they say what a run is, and hold no path ------------------------------------------------------------

    def pretraining_settings(self, cell: Cell) -> list[str]:
        """Return the settings of a cell's pre-training, but for its length."""
        kind = cell.arm.kind
        chosen = {**self.size.encoder, **self.size.pretraining, "optim.blr": f"{cell.blr:g}", **kind.settings}
        if kind.small_first:
            chosen["curriculum.img_size"] = self.size.small_first
        return [*as_overrides(chosen), f"run.seed={cell.seed}", "run.show_every=0"]

    def finetuning_settings(self, cell: Cell) -> list[str]:
        """Return the settings of a cell's fine-tuning."""
        steps = self.size.all_labels_steps if cell.all_labels else self.size.finetuning_steps
        length = [f"run.length={steps} steps", f"eval.every={steps} steps", f"checkpoint.every={steps // 4} steps"]
        classes = f"finetune.num_classes={self.split.num_classes}"
        return [*as_overrides({**self.size.encoder, **self.size.finetuning}), *length, classes, f"run.seed={cell.seed}"]

    # Costs ---------------------------------------------------------------------------------------------------------

    def reference_flops(self, cell: Cell) -> float:
        """Return the operations of the plain run of budget 1."""
        plain = dataclasses.replace(cell, arm=parse_arm("plain"))
        settings = [*without_seed(self.pretraining_settings(plain)), f"run.length={self.size.steps} steps"]
        return count_cost(self._planner(self.split.train).stretches("off", settings))

    def lengths(self, cell: Cell) -> Lengths:
        """Solve for the length of the arm that spends its share of the budget, and never more.

        Raises:
            InputError: the budget is less than a step, or does not go with a run that is stopped early.
        """
        planner, arm = self._planner(self.split.train), cell.arm
        settings = without_seed(self.pretraining_settings(cell))
        reference = self.reference_flops(cell)
        planned_share = 1.0 if arm.kind.stopped else arm.share
        target = cell.budget * planned_share * reference * (1 + 1e-12)  # a plain run is the budget itself, rounded
        planned = planner.length_for(arm.kind.recipe, settings, target)
        if arm.kind.stopped and planned % STOP_GRID:
            raise InputError(
                f"{arm.name} is stopped after tenths of the plain run, which has {planned} steps at a budget of "
                f"{cell.budget:g}; allowed: budgets that make them a multiple of {STOP_GRID}"
            )
        steps = round(planned * arm.share) if arm.kind.stopped else planned
        stretches = planner.stretches(arm.kind.recipe, [*settings, f"run.length={planned} steps"])
        return Lengths(
            steps=steps, planned_steps=planned, flops=count_cost(stretches, stop_step=steps),
            reference_flops=reference, finetuning_flops=count_cost(self.finetuning_stretches(cell)),
        )  # fmt: skip

    def finetuning_stretches(self, cell: Cell) -> tuple[Stretch, ...]:
        """Return the stretches of a cell's fine-tuning."""
        images = self.split.train if cell.all_labels else self.split.labelled
        settings = [*without_seed(self.finetuning_settings(cell)), "run.task=finetune"]
        return self._planner(images).stretches(self.size.recipe, settings)

    def _planner(self, images: int) -> Planner:
        return Planner(run=self.ask, images=images)

    # Commands ------------------------------------------------------------------------------------------------------

    def weights(self, cell: Cell, run: Path, lengths: Lengths) -> Path:
        """Return where the weights are that a cell is judged by."""
        if cell.arm.kind.stopped:
            return run / "pretrain" / "checkpoints" / f"step-{lengths.steps:08d}"
        return run / "pretrain"

    def pretrain(self, cell: Cell, run: Path, lengths: Lengths) -> list[str]:
        """Return the command that pre-trains; the run is saved after every tenth, and the plain one keeps them all."""
        keep = STOP_GRID if cell.arm.name == "plain" or cell.arm.kind.stopped else 2
        return [
            "pretrain", cell.arm.kind.recipe, *self.pretraining_settings(cell),
            f"run.length={lengths.planned_steps} steps", f"checkpoint.every={1 / STOP_GRID:g}",
            f"checkpoint.keep={keep}", f"data.train={self.split.shards('train')}", f"run.dir={run / 'pretrain'}",
        ]  # fmt: skip

    def finetune(self, cell: Cell, run: Path, weights: Path) -> list[str]:
        """Return the command that fine-tunes."""
        return [
            "finetune", self.size.recipe, *self.finetuning_settings(cell), f"model.init_from={weights}",
            f"run.dir={run / cell.finetuning_name}", f"data.train={self.split.shards(cell.labelled_part)}",
            f"data.val={self.split.shards(cell.judge)}",
        ]  # fmt: skip

    def linear(self, weights: Path, judge: str) -> list[str]:
        """Return the command of the linear probe."""
        return ["linear", str(weights), *self._evaluation(judge), *self.size.linear]

    def knn(self, weights: Path, judge: str) -> list[str]:
        """Return the command of k-NN."""
        return ["knn", str(weights), *self._evaluation(judge), "--k", str(NEIGHBOURS)]

    def _evaluation(self, judge: str) -> list[str]:
        workers = self.size.pretraining["data.workers"]
        return [
            "--train",
            self.split.shards("train"),
            "--val",
            self.split.shards(judge),
            "--workers",
            workers,
            *self.size.probe,
        ]


def as_overrides(chosen: Settings) -> list[str]:
    """Return settings as the command line takes them."""
    return [f"{key}={value if value else json.dumps(value)}" for key, value in chosen.items()]


def without_seed(settings: list[str]) -> list[str]:
    """Return the settings that a plan depends on, so that it is asked for once for all seeds."""
    return [setting for setting in settings if not setting.startswith("run.seed=")]
