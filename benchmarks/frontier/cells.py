"""One cell of the study: an arm with a seed, a budget and a learning rate, and what its files are called."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.frontier.arms import Arm


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured.

    Attributes:
        arm: what is pre-trained.
        seed: of weights, order, crops and masks, in pre-training and fine-tuning.
        budget: cost of an arm with share 1, in units of the plain run of the size's steps.
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
        """Folder of its pre-training, which cells with the same pre-training share."""
        name = "plain" if self.arm.kind.stopped else self.arm.name
        return f"{name}_{self._settings}"

    @property
    def name(self) -> str:
        """Its file, without suffix."""
        return f"{self.arm.name}_{self._settings}{self._judgement}"

    @property
    def finetuning_name(self) -> str:
        """Folder of its fine-tuning, in that of its pre-training."""
        return f"finetune{self._judgement}{self.stop_suffix}"

    @property
    def stop_suffix(self) -> str:
        """What tells the results of a run that was stopped early from those of the run that went on."""
        return f"_{self.arm.name}" if self.arm.kind.stopped else ""

    @property
    def judge(self) -> str:
        """Images that judge it."""
        return "test" if self.final else "held_out"

    @property
    def labelled_part(self) -> str:
        """Images that fine-tuning sees."""
        return "train" if self.all_labels else "labelled"

    @property
    def _settings(self) -> str:
        return f"budget{self.budget:g}_blr{self.blr:g}_seed{self.seed}"

    @property
    def _judgement(self) -> str:
        return f"{'_all' if self.all_labels else ''}{'_test' if self.final else ''}"
