"""What pre-training and fine-tuning do differently, so that one loop in train.py serves both."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vitfreeze.architecture import HEAD_SCALES
from vitfreeze.assembly import build_model
from vitfreeze.checkpoint.folder import FOLDER_NAME, sort_checkpoints
from vitfreeze.classifier import Classifier
from vitfreeze.closing import close_run
from vitfreeze.config import Config, settings
from vitfreeze.data import Batch, TrainLoader, check_labels, normalize, open_split
from vitfreeze.data.augmentation import Transform
from vitfreeze.engine import FreezingEngine
from vitfreeze.evaluate.probe import Probe
from vitfreeze.evaluate.visual import draw_figure, make_panels, to_pixels
from vitfreeze.model import LocalMIM
from vitfreeze.pretrained import Pretrained, load_encoder, read_pretrained
from vitfreeze.schedule import RunSchedule

logger = logging.getLogger("vitfreeze")
SHOWN_IMAGES = 4


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
        self, engine: FreezingEngine, batch: Batch, *, schedule: RunSchedule, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model on a micro-batch; return the loss to minimise, and its parts to log."""

    def end_step(self, engine: FreezingEngine) -> None:
        """Do what follows an update of the weights."""

    def evaluate(self, engine: FreezingEngine) -> dict[str, float]:
        """Return what the model is worth now; all ranks call it."""

    def draw(self, engine: FreezingEngine) -> Tensor | None:
        """Return a picture of what the model does, (3, H, W) from 0 to 1, on rank 0; None if there is none."""

    def close(self, directory: Path, engine: FreezingEngine) -> None:
        """Say what the run was worth, on rank 0, after its last step."""


class Pretraining:
    """LocalMIM: reconstruct what is masked.

    Raises:
        ConfigError: settings of fine-tuning are given, or `model.init_from` cannot be used.
    """

    description = "pre-training"
    picture = "reconstruction"
    transform: Transform | None = None
    num_classes: int | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        refuse_settings(config, ("finetune.",), task="pretrain")
        self._beginning = read_beginning(config)
        self._probe: Probe | None = None
        self._shown: Tensor | None = None

    def check_data(self, loader: TrainLoader) -> None:
        """Make sure that k-NN will find images and labels; raises ConfigError or ShardError."""
        if self.config.data.val:
            check_labels(self.config, "data.train", loader)
            check_labels(self.config, "data.val", open_split(self.config, "validation"))
        elif self.config.eval.every.value:
            raise self.config.error("data.val", "labelled shards, because eval.every asks for k-NN on the way")

    def build_model(self, *, is_new: bool) -> LocalMIM:
        """Return a LocalMIM; a new run begins with `model.init_from`, if that is set."""
        model = build_model(self.config)
        if is_new and self._beginning is not None:
            load_encoder(model, self._beginning.weights)
            logger.info("pre-training begins with %s", self._beginning.origin)
        return model

    def forward(
        self, engine: FreezingEngine, batch: Batch, *, schedule: RunSchedule, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over the living scales, and the loss of each."""
        output = engine(
            normalize(batch.images.to(engine.device, non_blocking=True)),
            noise=batch.noise.to(engine.device, non_blocking=True),
            frozen_layers=schedule.frozen_layers(step),
            scale_weights=schedule.scale_weights(step),
        )
        heads = schedule.active_heads(step)
        return output.loss, {f"{HEAD_SCALES[k]:g}": loss for k, loss in zip(heads, output.losses, strict=True)}

    def end_step(self, engine: FreezingEngine) -> None:
        """Do nothing."""

    def evaluate(self, engine: FreezingEngine) -> dict[str, float]:
        """Return the k-NN accuracy on held-out images, unless that would take too much of the time."""
        if self._probe is None:
            self._probe = Probe(
                self.config, rank=engine.rank, world_size=engine.world_size, mean_over_ranks=engine.mean_over_ranks
            )
        return self._probe.measure(engine.module)

    def draw(self, engine: FreezingEngine) -> Tensor | None:
        """Return the reconstruction of the same few images, with the same masks, every time."""
        if engine.rank:
            return None
        if self._shown is None:
            loader = open_split(self.config, "validation" if self.config.data.val else "train")
            self._shown = next(iter(loader)).images[:SHOWN_IMAGES]
        panels = make_panels(engine.module, self._shown.to(engine.device), frozen_layers=engine.frozen_layers)
        return to_pixels(draw_figure(panels))

    def close(self, directory: Path, engine: FreezingEngine) -> None:
        """Export the encoder, compare it with a random one, plot, and print the closing table."""
        close_run(self.config, directory, model=engine.module, fresh_model=build_model(self.config))


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
