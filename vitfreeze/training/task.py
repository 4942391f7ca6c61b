"""What pre-training and fine-tuning do differently, so that one loop serves both."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vitfreeze.checkpoint.folder import FOLDER_NAME, sort_checkpoints
from vitfreeze.config import Config, settings
from vitfreeze.data import Batch, TrainLoader
from vitfreeze.data.augmentation import Transform
from vitfreeze.engine import FreezingEngine
from vitfreeze.model import Classifier, LocalMIM
from vitfreeze.pretrained import Pretrained, read_pretrained
from vitfreeze.schedule import ScheduledStep

logger = logging.getLogger("vitfreeze")


class Task(Protocol):
    """What the loop asks of a task.

    Attributes:
        config: the settings of the run.
        transform: makes a training image; None: the random crop of the settings.
        num_classes: labels must exist and be smaller; None: labels are not looked at.
        description: what the progress bar calls it.
        picture: name of what `draw` shows; empty: nothing.
    """

    description: str
    picture: str
    config: Config
    transform: Transform | None
    num_classes: int | None

    def check_data(self, loader: TrainLoader) -> None:
        """Make sure, before anything is made, that evaluation can use its data; `loader` has the training images."""

    def build_model(self, *, is_new: bool) -> LocalMIM | Classifier:
        """Return the model, with the weights that a new run begins with."""

    def forward(
        self, engine: FreezingEngine, batch: Batch, *, now: ScheduledStep, micro_batch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model on the micro-batch of that number; return the loss to minimise, and its parts to log."""

    def end_step(self, engine: FreezingEngine) -> None:
        """Do what follows an update of the weights."""

    def evaluate(self, engine: FreezingEngine) -> dict[str, float]:
        """Return what the model is worth now; all ranks call it."""

    def draw(self, engine: FreezingEngine) -> Tensor | None:
        """Return a picture of what the model does, (3, H, W) from 0 to 1, on rank 0; None if there is none."""

    def close(self, directory: Path, engine: FreezingEngine) -> None:
        """Say what the run was worth, on rank 0, after its last step."""


def read_beginning(config: Config) -> Pretrained | None:
    """Read `model.init_from`, if it is set and the run has not begun; the run folder is not touched.

    Raises:
        ConfigError: there are no weights that can be used, or they are of another size.
    """
    directory = Path(config.run.dir or f"runs/{config.recipe}")
    if not config.model.init_from or sort_checkpoints(directory / FOLDER_NAME)[0]:
        return None
    try:
        found = read_pretrained(config.model.init_from)
    except ValueError as error:
        raise config.error("model.init_from", f"weights that can be read, and {error}") from None
    mine, theirs = config.model.resolve(), found.size
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    pairs = [(name, getattr(theirs, name), getattr(mine, name)) for name in names]
    if not config.finetune.resample_positions:
        pairs.append(("img_size", found.img_size, config.model.img_size))
    differing = [f"{name} {there:g} there and {here:g} here" for name, there, here in pairs if there != here]
    if differing:
        hint = "; to fine-tune, finetune.resample_positions=true fits them" if differing[0].startswith("img") else ""
        raise config.error("model.init_from", f"weights of this model's size, not with {', '.join(differing)}{hint}")
    if found.colours != config.data.colours:
        logger.warning(
            "%s saw images normalised by data.mean=%s data.std=%s, and this run normalises by %s and %s",
            found.origin, list(found.colours.mean), list(found.colours.std), list(config.data.mean),
            list(config.data.std),
        )  # fmt: skip
    if not found.is_finished:
        logger.warning("the run that model.init_from names has not finished: these are its weights at %s", found.origin)
    return found


def refuse_settings(config: Config, prefixes: tuple[str, ...], *, task: str) -> None:
    """Refuse settings that a task would ignore, as far as they differ from their defaults.

    Raises:
        ConfigError: one of them was set.
    """
    for (key, value, _), (_, default, _) in zip(settings(config), settings(Config()), strict=True):
        if key.startswith(prefixes) and value != default:
            raise config.error(key, f"its default {default!r}, because `vitfreeze {task}` has no use for it")
