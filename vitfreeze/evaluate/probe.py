"""The online probe: k-NN on held-out images while pre-training goes on, in a bounded share of its time."""

from __future__ import annotations

import logging
import time

from vitfreeze.config import Config
from vitfreeze.data import Batch, open_split
from vitfreeze.evaluate.features import Features, extract_features
from vitfreeze.evaluate.knn import knn_over_ranks
from vitfreeze.evaluate.ridge import ridge_over_ranks
from vitfreeze.model import LocalMIM
from vitfreeze.ranks import Ranks

logger = logging.getLogger("vitfreeze")


class Probe:
    """k-NN and a linear probe of `eval.samples` validation images by as many training images, with the encoder as is.

    The images are decoded once and kept: later probes cost two forward passes.

    Args:
        config: the run's settings.
        ranks: who share the images, and skip a probe together.
    """

    def __init__(self, config: Config, *, ranks: Ranks) -> None:
        self.config = config
        self._ranks = ranks
        self._images: dict[str, list[Batch]] = {}
        self._limit: dict[str, int] = {}
        self._started = time.perf_counter()
        self._spent_seconds = self._last_seconds = 0.0

    def measure(self, model: LocalMIM) -> dict[str, float]:
        """Return the accuracies, from 0 to 1, the seconds this took and the probes' share of the run's time so far.

        All ranks call it. Nothing is returned when this probe would take the share above `eval.max_share`.

        Raises:
            ConfigError: there are no validation shards.
            ValueError: images without labels.
        """
        if not self._is_affordable():
            share = self._spent_seconds / (time.perf_counter() - self._started)
            logger.info(
                "k-NN is left out this time: probes have taken %.1f %% of the time, and another one would exceed "
                "eval.max_share=%g",
                100 * share, self.config.eval.max_share,
            )  # fmt: skip
            return {}
        begin = time.perf_counter()
        first = not self._images
        train, test = (self._extract(model, split) for split in ("train", "validation"))
        k = self.config.eval.k
        accuracy = knn_over_ranks(train, test, k=(k,), ranks=self._ranks)[k]
        linear = ridge_over_ranks(train, test, ranks=self._ranks)
        seconds = time.perf_counter() - begin
        self._spent_seconds += seconds
        self._last_seconds = 0.0 if first else seconds  # the first one decodes, and says little of the next
        share = self._spent_seconds / (time.perf_counter() - self._started)
        logger.info(
            "%d-NN of held-out images: %.1f %%, linear probe %.1f %% (took %.1f s; probes take %.1f %% of the time)",
            k, 100 * accuracy, 100 * linear, seconds, 100 * share,
        )  # fmt: skip
        return {f"knn_{k}": accuracy, "linear": linear, "seconds": seconds, "share_of_time": share}

    def _is_affordable(self) -> bool:
        elapsed = time.perf_counter() - self._started
        ahead = (self._spent_seconds + self._last_seconds) / max(elapsed + self._last_seconds, 1e-9)
        # The clocks of the ranks differ; the mean does not.
        return not self._images or self._ranks.mean([ahead])[0] <= self.config.eval.max_share

    def _extract(self, model: LocalMIM, split: str) -> Features:
        """Return the features of this rank's share of the first `eval.samples` images of a split."""
        if split not in self._images:
            loader = open_split(self.config, split, rank=self._ranks.rank, world_size=self._ranks.world_size)
            wanted = -(-min(self.config.eval.samples, loader.num_samples) // self._ranks.world_size)
            kept: list[Batch] = []
            for batch in loader:
                kept.append(batch)
                if sum(len(batch.images) for batch in kept) >= wanted:
                    break
            self._images[split], self._limit[split] = kept, wanted
        return extract_features(model, self._images[split], limit=self._limit[split], colours=self.config.data.colours)
