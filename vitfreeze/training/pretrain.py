"""Pre-training: LocalMIM on unlabelled images."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from vitfreeze.architecture import HEAD_SCALES
from vitfreeze.config import Config, choose_task
from vitfreeze.data import Batch, TrainLoader, check_labels, normalize, open_split, tabulate
from vitfreeze.data.augmentation import Transform
from vitfreeze.engine import FreezingEngine
from vitfreeze.evaluate.probe import Probe
from vitfreeze.evaluate.visual import draw_figure, make_panels, to_pixels
from vitfreeze.model import LocalMIM, Pixels
from vitfreeze.pretrained import load_encoder
from vitfreeze.schedule import ScheduledStep
from vitfreeze.training.build import build_model
from vitfreeze.training.loop import run_task
from vitfreeze.training.summary import summarize_run
from vitfreeze.training.task import read_beginning, refuse_settings

logger = logging.getLogger("vitfreeze")
SHOWN_IMAGES = 4


def pretrain(config: Config, *, fresh: bool = False) -> int:
    """Pre-train as `config` says, from the newest checkpoint if there is one; return the exit status.

    Raises:
        ConfigError: a setting cannot be used, or the run folder holds another run.
    """
    return run_task(Pretraining(choose_task(config, "pretrain")), fresh=fresh)


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
        self, engine: FreezingEngine, batch: Batch, *, now: ScheduledStep, micro_batch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over the living scales, and the loss of each."""
        output = engine(
            normalize(batch.images, colours=self.config.data.colours),
            noise=batch.noise,
            pixels=Pixels(batch.images, tabulate(batch.images.device, self.config.data.colours)),
            scale_weights=now.scale_weights,
            mask_ratio=now.images.mask_ratio,
            decoded_share=now.images.decoded_share,
        )
        return output.loss, {f"{HEAD_SCALES[k]:g}": loss for k, loss in zip(now.heads, output.losses, strict=True)}

    def end_step(self, engine: FreezingEngine) -> None:
        """Do nothing."""

    def evaluate(self, engine: FreezingEngine) -> dict[str, float]:
        """Return the k-NN accuracy on held-out images, unless that would take too much of the time."""
        if self._probe is None:
            self._probe = Probe(self.config, ranks=engine.ranks)
        return self._probe.measure(engine.module)

    def draw(self, engine: FreezingEngine) -> Tensor | None:
        """Return the reconstruction of the same few images, with the same masks, every time."""
        if engine.rank:
            return None
        if self._shown is None:
            loader = open_split(self.config, "validation" if self.config.data.val else "train")
            self._shown = next(iter(loader)).images[:SHOWN_IMAGES]
        panels = make_panels(
            engine.module, self._shown.to(engine.device), frozen_layers=engine.frozen_layers,
            colours=self.config.data.colours,
        )  # fmt: skip
        return to_pixels(draw_figure(panels))

    def close(self, directory: Path, engine: FreezingEngine) -> None:
        """Export the encoder, compare it with a random one, plot, and print the summary."""
        summarize_run(self.config, directory, model=engine.module, fresh_model=build_model(self.config))
