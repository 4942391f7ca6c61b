"""The account of an epoch: what was decoded, what could not be, and when that is too much."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vitfreeze.data.errors import ShardError
from vitfreeze.ranks import Ranks

_log = logging.getLogger(__name__)

_SHARDS_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """A sample that could not be used.

    Attributes:
        index: its place in the concatenation of all shards.
        shard: the shard it lies in.
        key: its key; '#' and its place in the shard where it has none.
        reason: what is wrong with it.
    """

    index: int
    shard: str
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What one rank, or all of them together, met in one epoch.

    Attributes:
        epoch: number of the epoch, from 0.
        epoch_images: images of the whole epoch over all ranks.
        images: images decoded; fewer than the epoch's on one of several ranks, or after a resume.
        fallbacks: how many of them Pillow decoded.
        skipped: the samples that could not be used, once each.
    """

    epoch: int
    epoch_images: int
    images: int
    fallbacks: int
    skipped: Sequence[SkippedSample]

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> EpochReport:
        """Read what `dataclasses.asdict` made of a report, on this rank or another one."""
        return cls(**{**facts, "skipped": tuple(SkippedSample(**sample) for sample in facts["skipped"])})

    @property
    def skipped_per_shard(self) -> Mapping[str, int]:
        """Number of unusable samples of each shard that has any."""
        return Counter(sample.shard for sample in self.skipped)


def merge_reports(reports: Sequence[EpochReport], *, max_bad_fraction: float) -> EpochReport:
    """Join reports on one epoch: those of all ranks, or that of a rank so far with that of its next batch.

    Raises:
        ShardError: together they met more unusable samples than `max_bad_fraction` of the epoch; it names the shards.
        ValueError: the reports are of different epochs, or there is none.
    """
    if len({report.epoch for report in reports}) != 1:
        raise ValueError(f"reports of the epochs {sorted({report.epoch for report in reports})} cannot be joined")
    merged = EpochReport(
        epoch=reports[0].epoch,
        epoch_images=reports[0].epoch_images,
        images=sum(report.images for report in reports),
        fallbacks=sum(report.fallbacks for report in reports),
        skipped=tuple({sample.index: sample for report in reports for sample in report.skipped}.values()),
    )
    if len(merged.skipped) > max_bad_fraction * merged.epoch_images:
        raise ShardError(
            f"{len(merged.skipped)} of {merged.epoch_images} samples of epoch {merged.epoch} are unusable, over "
            f"data.max_bad_fraction={max_bad_fraction:g}: {describe_skipped(merged)}"
        )
    return merged


def merge_over_ranks(mine: EpochReport, *, ranks: Ranks, max_bad_fraction: float) -> EpochReport:
    """Join the reports of all ranks, each of which calls this; raises ShardError as `merge_reports` does."""
    reports = [EpochReport.from_json(facts) for facts in ranks.gather(asdict(mine))]
    return merge_reports(reports, max_bad_fraction=max_bad_fraction)


def describe_skipped(report: EpochReport) -> str:
    """Name the shards with most unusable samples, with a count and one reason each."""
    counts = Counter(report.skipped_per_shard)
    reasons = {sample.shard: f"{sample.key}: {sample.reason}" for sample in report.skipped}
    parts = [f"{shard} ({count}; {reasons[shard]})" for shard, count in counts.most_common(_SHARDS_NAMED)]
    return ", ".join(parts) + (", ..." if len(counts) > _SHARDS_NAMED else "")


def log_report(report: EpochReport) -> None:
    """Log what was odd in an epoch."""
    if report.skipped:
        count = len(report.skipped)
        _log.warning("epoch %d: %d samples were unusable: %s", report.epoch, count, describe_skipped(report))
    if report.fallbacks:
        level = logging.DEBUG if report.epoch else logging.INFO  # it is no news in the next epoch
        _log.log(level, "epoch %d: Pillow decoded %d of %d images", report.epoch, report.fallbacks, report.images)
