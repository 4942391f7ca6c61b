"""The images of the study: training, held out for every choice, labels for fine-tuning, and the test set.

Which image is where depends on the labels and on the order in the shards alone, so every arm and seed sees the same.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.frontier.errors import InputError
from benchmarks.frontier.files import write_json

logger = logging.getLogger("frontier")

SPLIT_SEED = 19
SAMPLES_PER_SHARD = 1000
PARTS = ("train", "labelled", "held_out", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Folders of shards, what the data set is called, and how many images each folder holds.

    `labelled` are some of `train`; the others have no image in common.
    """

    folder: Path
    name: str
    train: int
    labelled: int
    held_out: int
    test: int
    num_classes: int

    def shards(self, part: str) -> str:
        """Return the folder of the shards of train, labelled, held_out or test."""
        return str(self.folder / part)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One labelled image as it lies in a shard."""

    key: str
    suffix: str
    image: bytes
    label: int


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many images to hold out, and how many labels to take from the rest; `given` ones are not made smaller."""

    held_out: int
    labels: int
    given: bool = False

    def fit(self, images: int, *, makes_test: bool) -> Counts:
        """Return the counts for so many training images: at most a tenth held out, half of the rest labelled.

        Raises:
            InputError: counts that were given are too large, or nothing is left.
        """
        held_out = min(self.held_out, images // 10)
        rest = images - held_out * (2 if makes_test else 1)
        fitted = Counts(held_out=held_out, labels=min(self.labels, rest // 2), given=self.given)
        if fitted != self and self.given:
            raise InputError(
                f"of {images} training images {self.held_out} cannot be held out and {self.labels} labelled; allowed: "
                f"at most {held_out}, a tenth, and at most {rest // 2}, half of the rest"
            )
        if held_out < 1:
            raise InputError(f"{images} training images are too few to hold out any of them; allowed: at least 10")
        if fitted != self:
            logger.warning(
                "%d training images: %d are held out and %d labelled, not %d and %d",
                images, fitted.held_out, fitted.labels, self.held_out, self.labels,
            )  # fmt: skip
        return fitted


def prepare(data: Path, out: Path, *, counts: Counts, pixels: int, workers: int = 1) -> Split:
    """Pack and split a labelled folder or a folder of shards into `out`; what is there already is taken.

    Args:
        data: a tree with a folder per class (with train/ and test/ or val/ above them, or without), or a folder that
            data_prep wrote. Without test or validation images, as many as are held out are made the test set.
        out: where the four folders of shards go.
        counts: images to hold out, and labels.
        pixels: shorter side to which larger images of a tree are shrunk; shards are taken as they are.
        workers: processes that pack a tree.

    Raises:
        InputError: there are no such images, they have no labels, or too few of them; or `out` holds another split.
    """
    wanted = {"data": data.resolve().name, "held_out": counts.held_out, "labels": counts.labels}
    marker = out / "split.json"
    if marker.is_file():
        found = json.loads(marker.read_text())
        if found["wanted"] != wanted:
            raise InputError(f"{out} holds the split {found['wanted']}, not {wanted}; give another --out")
        return Split(folder=out, **found["split"])
    source = data if (data / "_info.json").is_file() else _pack(data, out / "packed", pixels=pixels, workers=workers)
    shards = _list_shards(source)
    makes_test = "validation" not in shards
    classes = np.array([sample.label for sample in _read_samples(shards["train"])])
    fitted = counts.fit(len(classes), makes_test=makes_test)
    places = divide(classes, held_out=fitted.held_out, labels=fitted.labels, makes_test=makes_test)
    written = _write_parts(_read_samples(shards["train"]), places, out)
    if not makes_test:
        tested = _read_samples(shards["validation"])
        written |= _write_parts(tested, {"test": None}, out)
    split = Split(folder=out, name=data.resolve().name, num_classes=int(classes.max()) + 1, **written)
    facts = {name: value for name, value in asdict(split).items() if name != "folder"}
    write_json({"wanted": wanted, "split": facts}, marker)
    return split


def _pack(data: Path, out: Path, *, pixels: int, workers: int) -> Path:
    options = [
        "--resize-shorter",
        str(pixels),
        "--samples-per-shard",
        str(SAMPLES_PER_SHARD),
        "--workers",
        str(workers),
    ]
    command = [sys.executable, "-m", "data_prep", "folder", str(data), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{data} cannot be packed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return out


def _list_shards(folder: Path) -> dict[str, list[Path]]:
    splits = json.loads((folder / "_info.json").read_text())["splits"]
    if "train" not in splits:
        raise InputError(f"{folder} has the splits {sorted(splits)}, but the study needs training images")
    return {name: [folder / file for file in splits[name]["filenames"]] for name in splits}


def _read_samples(shards: Sequence[Path]) -> Iterator[Sample]:
    """Yield the samples of data_prep's shards, in their order, which is shuffled."""
    for shard in shards:
        images: dict[str, tuple[str, bytes]] = {}
        labels: dict[str, int] = {}
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                file = archive.extractfile(member)
                if file is None or suffix == "json":
                    continue
                if suffix == "cls":
                    labels[key] = int(file.read())
                else:
                    images[key] = (suffix, file.read())
        for key, (suffix, image) in images.items():
            if key not in labels:
                raise InputError(f"{shard} has no label for {key}; the study needs labelled images")
            yield Sample(key=key, suffix=suffix, image=image, label=labels[key])


def divide(classes: np.ndarray, *, held_out: int, labels: int, makes_test: bool) -> dict[str, np.ndarray]:
    """Divide the places 0..N-1 of labelled samples into parts in which every class has its share.

    Args:
        classes: (N,) label of each sample.
        held_out: samples of the part held_out, and, if `makes_test`, of the part test.
        labels: samples of the part labelled, all of them in train too.
        makes_test: whether there is a part test.

    Returns:
        the places of each part, in rising order.
    """
    taken = held_out * (2 if makes_test else 1)
    order = _interleave_classes(classes)
    parts = {"held_out": order[:held_out], "train": order[taken:], "labelled": order[taken : taken + labels]}
    if makes_test:
        parts["test"] = order[held_out:taken]
    return {name: np.sort(places) for name, places in parts.items()}


def _interleave_classes(classes: np.ndarray) -> np.ndarray:
    """Return the places in an order of which every stretch holds every class by its share, shuffled in each class."""
    random = np.random.default_rng(SPLIT_SEED)
    positions = np.empty(len(classes))
    for label in np.unique(classes):
        places = np.flatnonzero(classes == label)
        positions[random.permutation(places)] = (np.arange(len(places)) + random.random()) / len(places)
    return np.argsort(positions, kind="stable")


def _write_parts(samples: Iterable[Sample], places: Mapping[str, np.ndarray | None], out: Path) -> dict[str, int]:
    """Write the samples at the given places (None: all) as the shards of parts; return how many each part holds."""
    wanted = {part: None if chosen is None else set(chosen.tolist()) for part, chosen in places.items()}
    writers = {part: _PartWriter(out / part) for part in places}
    for place, sample in enumerate(samples):
        for part, writer in writers.items():
            chosen = wanted[part]
            if chosen is None or place in chosen:
                writer.add(sample)
    for writer in writers.values():
        writer.close()
    return {part: writer.count for part, writer in writers.items()}


class _PartWriter:
    """Writes samples as shards of SAMPLES_PER_SHARD, each renamed to its name when it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self._archive: tarfile.TarFile | None = None
        self._path = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, sample: Sample) -> None:
        """Write one sample."""
        if self.count % SAMPLES_PER_SHARD == 0:
            self.close()
            self._path = self.folder / f"{self.folder.name}-{self.count // SAMPLES_PER_SHARD:04d}.tar"
            self._archive = tarfile.open(self._path.with_suffix(".partial"), "w")  # noqa: SIM115 - `close` closes it
        self._add_member(f"{sample.key}.{sample.suffix}", sample.image)
        self._add_member(f"{sample.key}.cls", str(sample.label).encode())
        self.count += 1

    def _add_member(self, name: str, content: bytes) -> None:
        assert self._archive is not None
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._archive.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        """Finish the shard that is being written."""
        if self._archive is not None:
            self._archive.close()
            os.replace(self._path.with_suffix(".partial"), self._path)
        self._archive = None
