"""What is in a folder of shards: counts, balance of the classes, sizes of the images, as text and as a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.catalogue import NO_LABEL
from data_prep.errors import InputError, OutputError, UndecodableError
from data_prep.images import EXTENSIONS, measure_colours
from data_prep.json_text import parse_json
from data_prep.manifest import require_manifest
from data_prep.progress import show_progress
from data_prep.shards import ShardEntry
from data_prep.verification import read_samples, read_text
from data_prep.workers import run_tasks

BAR_WIDTH = 40
NUM_BINS = 12
NAMED_CLASSES = 3
MEASURED_IMAGES = 4000  # whose colours stand for those of their split: the mean is then exact to about 0.003


@dataclass
class SplitStatistics:
    """Counts over the samples of one split (or of one shard of it)."""

    split: str
    labels: Counter[int] = field(default_factory=Counter)
    shorter_sides: Counter[int] = field(default_factory=Counter)
    extensions: Counter[str] = field(default_factory=Counter)
    num_image_bytes: int = 0
    num_measured: int = 0
    moments: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))  # sums of mean and mean square, R G B

    @property
    def num_samples(self) -> int:
        return self.labels.total()

    def add(self, other: SplitStatistics) -> None:
        """Add the counts of another part."""
        self.labels += other.labels
        self.shorter_sides += other.shorter_sides
        self.extensions += other.extensions
        self.num_image_bytes += other.num_image_bytes
        self.num_measured += other.num_measured
        self.moments += other.moments

    def colours(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of R, G and B, as shares of white, every image weighing the same."""
        mean, square = self.moments / max(self.num_measured, 1)
        return [round(float(x), 4) for x in mean], [
            round(float(x), 4) for x in np.sqrt(np.maximum(square - mean**2, 0))
        ]


@dataclass(frozen=True)
class Description:
    """Statistics of every split and the class names in label order."""

    dataset: str
    classes: Sequence[str]
    splits: dict[str, SplitStatistics]

    def __str__(self) -> str:
        blocks = [f"{self.dataset}: {len(self.classes) or 'no'} classes"]
        blocks += [_describe_split(statistics, self.classes) for statistics in self.splits.values()]
        return "\n\n".join(blocks)


def describe(folder: Path, *, workers: int) -> Description:
    """Read labels and sizes of all samples; about MEASURED_IMAGES of each split are decoded for their colours.

    Raises:
        InputError: no manifest, or a shard that cannot be read.
    """
    manifest = require_manifest(folder)
    splits: dict[str, SplitStatistics] = {}
    with show_progress("reading", total=sum(entry.num_samples for entry in manifest.shards)) as advance:
        shards = Counter(entry.split for entry in manifest.shards)
        decoded = {split: -(-MEASURED_IMAGES // number) for split, number in shards.items()}
        count = partial(describe_shard, folder=folder, decoded=decoded)
        for part in run_tasks(count, manifest.shards, workers=workers, preload=[__name__]):
            splits.setdefault(part.split, SplitStatistics(part.split)).add(part)
            advance(part.num_samples, part.num_image_bytes)
    return Description(manifest.settings["dataset"], manifest.classes, dict(sorted(splits.items())))


def describe_shard(entry: ShardEntry, *, folder: Path, decoded: Mapping[str, int]) -> SplitStatistics:
    """Statistics of one shard; its first `decoded[split]` images are decoded: a random choice, as all are shuffled.

    Raises:
        InputError: it cannot be read.
    """
    statistics, path = SplitStatistics(entry.split), folder / entry.name
    for sample in read_samples(path):
        try:
            label = int(read_text(sample, "cls")) if "cls" in sample.members else NO_LABEL
            facts = parse_json(read_text(sample, "json"))
            shorter = min(int(facts["height"]), int(facts["width"]))
            extension = next(name for name in sample.members if name in EXTENSIONS.values())
            if statistics.num_measured < decoded[entry.split]:
                statistics.moments += measure_colours(sample.members[extension].read())
                statistics.num_measured += 1
        except (UndecodableError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise InputError(f"{path} holds the damaged sample {sample.key}: `verify` tells more.") from error
        statistics.labels[label] += 1
        statistics.shorter_sides[shorter] += 1
        statistics.extensions[extension] += 1
        statistics.num_image_bytes += sample.members[extension].size
    return statistics


def _describe_split(statistics: SplitStatistics, classes: Sequence[str]) -> str:
    count = statistics.num_samples
    if not count:
        return f"{statistics.split}: no samples"
    mean, std = statistics.colours()
    lines = [
        f"{statistics.split}: {count} samples ({_list_formats(statistics)}), "
        f"{statistics.num_image_bytes / count / 1e3:.1f} KB an image",
        *(_describe_balance(statistics, classes) if classes else ["  without labels"]),
        f"  colours of {statistics.num_measured} images: 'data.mean={mean}' 'data.std={std}'",
        "  shorter side in pixels:",
        *_draw_bars(statistics.shorter_sides),
    ]
    return "\n".join(lines)


def _list_formats(statistics: SplitStatistics) -> str:
    return ", ".join(f"{number} {name}" for name, number in statistics.extensions.most_common())


def _describe_balance(statistics: SplitStatistics, classes: Sequence[str]) -> list[str]:
    per_class = np.array([statistics.labels[label] for label in range(len(classes))])
    order = np.argsort(per_class, kind="stable")
    present = [label for label in order if per_class[label]]
    fewest = ", ".join(f"{classes[label]} {per_class[label]}" for label in present[:NAMED_CLASSES])
    most = ", ".join(f"{classes[label]} {per_class[label]}" for label in present[::-1][:NAMED_CLASSES])
    return [
        f"  images per class: {per_class.min()} to {per_class.max()}, median {np.median(per_class):g}, "
        f"{int((per_class == 0).sum())} classes without any",
        f"  fewest: {fewest}",
        f"  most:   {most}",
    ]


def size_bins(shorter_sides: Counter[int]) -> tuple[np.ndarray, np.ndarray]:
    """Edges (n + 1) and counts (n) over the shorter side; bins grow in proportion to the size."""
    sides = np.array(list(shorter_sides), dtype=np.int64)
    weights = np.array(list(shorter_sides.values()), dtype=np.int64)
    low, high = int(sides.min()), int(sides.max()) + 1
    edges = np.unique(np.round(np.geomspace(low, high, NUM_BINS + 1)).astype(np.int64))
    counts, _ = np.histogram(sides, bins=edges, weights=weights)
    return edges, counts


def _draw_bars(shorter_sides: Counter[int]) -> list[str]:
    edges, counts = size_bins(shorter_sides)
    largest = counts.max()
    lines = []
    for low, high, number in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * max(int(number > 0), round(BAR_WIDTH * number / largest))
        lines.append(f"  {f'{low}-{high - 1}' if high - 1 > low else low:>11} {bar:<{BAR_WIDTH}} {number}")
    return lines


def draw_figure(description: Description, path: Path) -> None:
    """Save images per class and the histogram of sizes, a row for each split.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2 * len(description.splits)), layout="constrained")
    axes = figure.subplots(len(description.splits), 2, squeeze=False)
    for (balance, sizes), statistics in zip(axes, description.splits.values(), strict=True):
        per_class = sorted((statistics.labels[label] for label in range(len(description.classes))), reverse=True)
        balance.step(range(len(per_class)), per_class, where="mid")
        balance.set(title=f"{statistics.split}: images per class", xlabel="classes, largest first", ylim=(0, None))
        edges, counts = size_bins(statistics.shorter_sides)
        sizes.stairs(counts, edges, fill=True)
        sizes.set(title=f"{statistics.split}: size", xlabel="shorter side in pixels", ylabel="images")
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.") from error
