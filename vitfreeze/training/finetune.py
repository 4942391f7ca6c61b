"""Fine-tuning: the encoder as a classifier, trained by the loop, the engine and the checkpoints of pre-training.

Source: LocalMIM's fine-tuning, which is MAE's (He et al., CVPR 2022, appendix A.2): layer-wise decay of the learning
rate, drop path, mixup, cutmix, label smoothing, RandAugment, random erasing, and a classifier on the mean of the
patches behind a fresh norm. All of these are timm's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from vitfreeze.config import Colours, Config, FinetuneConfig, choose_task
from vitfreeze.data import Batch, TrainLoader, normalize, open_split
from vitfreeze.data.augmentation import Transform
from vitfreeze.data.finetuning import BatchMixing, FinetuneTransform
from vitfreeze.data.normalization import IMAGENET
from vitfreeze.engine import FreezingEngine
from vitfreeze.export import export_run
from vitfreeze.files import read_json_lines
from vitfreeze.model import Classifier
from vitfreeze.plots import plot_run
from vitfreeze.pretrained import encoder_weights
from vitfreeze.ranks import Ranks
from vitfreeze.schedule import ScheduledStep
from vitfreeze.training.build import build_classifier
from vitfreeze.training.loop import run_task
from vitfreeze.training.summary import log_summary
from vitfreeze.training.task import read_beginning, refuse_settings

logger = logging.getLogger("vitfreeze")

# Settings of pre-training that fine-tuning has no use for.
_OTHERS = (
    *(
        "loss.",
        "curriculum.mask_ratio",
        "curriculum.decoded_share",
        "model.hog_",
        "model.mask_ratio",
        "model.decoder_",
        "data.crops_per_image",
    ),
    *("freeze.heads_lr", "freeze.cls_token", "freeze.patch_embed"),
    *("eval.samples", "eval.k", "eval.max_share", "run.show_every"),
)


def finetune(config: Config, *, fresh: bool = False) -> int:
    """Fine-tune as `config` says, from the newest checkpoint if there is one; return the exit status.

    Raises:
        ConfigError: a setting cannot be used, or the run folder holds another run.
    """
    return run_task(Finetuning(choose_task(config, "finetune")), fresh=fresh)


class Finetuning:
    """Classification of labelled images.

    Raises:
        ConfigError: settings of pre-training are given, validation is never due, `model.init_from` cannot be used, or
            timm does not know the policy.
    """

    description = "fine-tuning"
    picture = ""

    def __init__(self, config: Config) -> None:
        self.config = config
        settings = config.finetune
        refuse_settings(config, _OTHERS, task="finetune")
        if config.eval.every.value == 0:
            raise config.error(
                "eval.every", "above 0, as in '1 epochs': fine-tuning is judged by its validation images"
            )
        if not config.data.val:
            raise config.error("data.val", "labelled validation shards")
        self._beginning = read_beginning(config)
        self.num_classes: int | None = settings.num_classes
        self.transform: Transform | None = self._build_transform()
        self.mixing = BatchMixing(
            num_classes=settings.num_classes,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            smoothing=settings.smoothing,
            reprob=settings.reprob,
            seed=config.run.seed,
            colours=config.data.colours,
        )

    def check_data(self, loader: TrainLoader) -> None:
        """Make sure that the validation shards are there, and that their labels go with the number of classes."""
        open_split(self.config, "validation", num_classes=self.num_classes)

    def _build_transform(self) -> FinetuneTransform:
        config = self.config
        try:
            return FinetuneTransform(
                img_size=config.model.img_size,
                scale=config.data.crop_scale,
                auto_augment=config.finetune.aa,
                colours=config.data.colours,
            )
        except ValueError as error:
            raise config.error("finetune.aa", f"a policy of timm, such as {FinetuneConfig.aa} ({error})") from None

    def build_model(self, *, is_new: bool) -> Classifier:
        """Return the classifier; a new run begins with the encoder that `model.init_from` names.

        Raises:
            ValueError: its tensors do not fit.
        """
        model = build_classifier(self.config)
        if is_new and self._beginning is not None:
            model.load_encoder(fit_positions(encoder_weights(self._beginning), model=model))
            logger.info("fine-tuning begins with %s", self._beginning.origin)
        elif is_new:
            logger.warning("fine-tuning begins with random weights, because model.init_from is empty")
        return model

    def forward(
        self, engine: FreezingEngine, batch: Batch, *, now: ScheduledStep, micro_batch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross entropy with the mixed, smoothed labels; it has no parts."""
        images, targets = self.mixing.apply(
            batch.images, batch.labels, step=now.step, rank=engine.rank, number=micro_batch
        )
        with _seeded_drop_path((self.config.run.seed, now.step, engine.rank, micro_batch), device=engine.device):
            output = engine(images, targets=targets)
        return output.loss, {}

    def end_step(self, engine: FreezingEngine) -> None:
        """Move the average of the weights, if there is one."""
        engine.module.update_average()

    def evaluate(self, engine: FreezingEngine) -> dict[str, float]:
        """Return top-1 and top-5 accuracy, from 0 to 1, and mean loss over all validation images of all ranks.

        With an average of the weights, `ema_top1` and `ema_top5` are what the average reaches.
        """
        model = engine.module
        loader = open_split(
            self.config, "validation", rank=engine.rank, world_size=engine.world_size, num_classes=self.num_classes
        )
        figures = measure_accuracy(model, loader, ranks=engine.ranks, colours=self.config.data.colours)
        loader.tell_unusable(engine.ranks)
        logger.info(
            "top-1 %.2f %%, top-5 %.2f %% of %d validation images",
            100 * figures["top1"], 100 * figures["top5"], figures["images"],
        )  # fmt: skip
        return figures

    def draw(self, engine: FreezingEngine) -> Tensor | None:
        """Return None: there is nothing to reconstruct."""
        return None

    def close(self, directory: Path, engine: FreezingEngine) -> None:
        """Export the model, plot, and print where everything is."""
        model = export_run(directory, to="timm", out=directory / "model")
        plot = plot_run(directory, directory / "run.png")
        worth = read_json_lines(directory / "metrics.jsonl")[-1]["eval"]
        lines = [
            f"top-1     {100 * worth['top1']:.2f} % of {worth['images']:.0f} validation images",
            f"top-5     {100 * worth['top5']:.2f} %",
            f'model     {model} (timm.create_model("local-dir:{model}", pretrained=True))',
            f"plot      {plot}",
            f"metrics   {directory / 'metrics.jsonl'}",
        ]
        if "ema_top1" in worth:
            lines.insert(2, f"average   {100 * worth['ema_top1']:.2f} % top-1; the exported weights are the average")
        log_summary(self.config, directory, lines)


def fit_positions(weights: Mapping[str, Tensor], *, model: Classifier) -> dict[str, Tensor]:
    """Return the weights with positions for as many patches as the model has, resampled as MAE's fine-tuning does."""
    positions, wanted = weights["pos_embed"], cast(Tensor, model.pos_embed).shape
    if positions.shape == wanted:
        return dict(weights)
    side = math.isqrt(wanted[1] - 1)
    logger.info("positions of %d patches are resampled for %d", positions.shape[1] - 1, wanted[1] - 1)
    return {**weights, "pos_embed": resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=1)}


@torch.no_grad()
def measure_accuracy(
    model: Classifier, batches: Iterable[Batch], *, ranks: Ranks, colours: Colours = IMAGENET
) -> dict[str, float]:
    """Return accuracies from 0 to 1 and the mean loss over the images of all ranks, each counted once.

    Args:
        model: on this rank's device; put into evaluation mode for the time.
        batches: this rank's labelled images.
        ranks: who add up.
        colours: what images are normalised by.

    Raises:
        ValueError: there are no images.
    """
    predictors = {"": lambda images: model(images).logits}
    if model.average is not None:
        predictors["ema_"] = model.predict_with_average
    totals = {prefix: torch.zeros(4, dtype=torch.float64, device=ranks.device) for prefix in predictors}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            images, labels = normalize(batch.images.to(ranks.device), colours=colours), batch.labels.to(ranks.device)
            for prefix, predict in predictors.items():
                totals[prefix] += _count_hits(predict(images), labels)
    finally:
        model.train(was_training)
    figures: dict[str, float] = {}
    for prefix, total in totals.items():
        top1, top5, loss, images_seen = ranks.sum(total).tolist()
        if not images_seen:
            raise ValueError("there is no validation image to measure the accuracy with")
        figures |= {f"{prefix}top1": top1 / images_seen, f"{prefix}top5": top5 / images_seen}
        figures |= {f"{prefix}loss": loss / images_seen, "images": images_seen}
    return figures


def _count_hits(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return (4,) float64: images right at first, among the first five, sum of losses, images."""
    found_B5 = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
    right_B5 = found_B5 == labels_B[:, None]
    loss = F.cross_entropy(logits_BC.double(), labels_B, reduction="sum")
    count = torch.tensor(len(labels_B), device=logits_BC.device)
    return torch.stack([right_B5[:, 0].sum().double(), right_B5.sum().double(), loss, count.double()])


@contextmanager
def _seeded_drop_path(words: tuple[int, ...], *, device: torch.device) -> Iterator[None]:
    """Draw what drop path drops from (seed, step, rank, micro-batch), so that a resumed run drops the same."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
        yield
