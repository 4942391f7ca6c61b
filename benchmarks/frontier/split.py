"""The images of the study: training, held out for every choice, labels for fine-tuning, and the test set.

Which image is where depends on its label and its place in the shards alone, so every arm and seed sees the same split.
"""

from __future__ import annotations

import io
import json
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

SPLIT_SEED = 19
SAMPLES_PER_SHARD = 1000
LARGEST_SHARE = 0.2  # of the training images, that may be held out, and again be made a test set


@dataclass(frozen=True, kw_only=True)
class Split:
    """Folders of shards, what the data set is called, and how many images each folder holds."""

    folder: Path
    name: str
    train: int
    labelled: int
    held_out: int
    test: int
    num_classes: int

    def shards(self, part: str) -> str:
        """Return the shards of train, labelled, held_out or test as a setting of vitfreeze."""
        return json.dumps([str(path) for path in sorted((self.folder / part).glob("*.tar"))])


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One labelled image as it lies in a shard."""

    key: str
    suffix: str
    image: bytes
    label: int


def prepare(data: Path, out: Path, *, held_out: int, labels: int, pixels: int, workers: int = 1) -> Split:
    """Pack and split a labelled folder or a folder of shards into `out`; what is there already is taken.

    Args:
        data: a tree with a folder per class (with train/ and test/ or val/ above them, or without), or a folder that
            data_prep wrote.
        out: where the four folders of shards go.
        held_out: images taken from the training set for every choice.
        labels: of what is left, images whose labels fine-tuning may use.
        pixels: shorter side to which larger images of a tree are shrunk; shards are taken as they are.
        workers: processes that pack a tree.

    Raises:
        InputError: there are no such images, they have no labels, or too few of them; or `out` holds another split.
    """
    wanted = {"data": data.resolve().name, "held_out": held_out, "labels": labels}
    marker = out / "split.json"
    if marker.is_file():
        return _read_split(marker, wanted)
    source = data if (data / "_info.json").is_file() else _pack(data, out / "packed", pixels=pixels, workers=workers)
    shards = _list_shards(source)
    classes = np.array([sample.label for sample in _read_samples(shards["train"])])
    parts = divide(classes, held_out=held_out, labels=labels, make_test="validation" not in shards)
    counts = {part: len(places) for part, places in parts.items()}
    for part, places in parts.items():
        _write_samples(_choose(_read_samples(shards["train"]), places), out / part)
    if "validation" in shards:
        counts["test"] = _write_samples(_read_samples(shards["validation"]), out / "test")
    split = Split(folder=out, name=data.resolve().name, num_classes=int(classes.max()) + 1, **counts)
    facts = {name: value for name, value in asdict(split).items() if name != "folder"}
    write_json({"wanted": wanted, "split": facts}, marker)
    return split


def _read_split(marker: Path, wanted: Mapping[str, object]) -> Split:
    found = json.loads(marker.read_text())
    if found["wanted"] != wanted:
        raise InputError(f"{marker.parent} holds the split {found['wanted']}, not {wanted}; give another --out")
    return Split(folder=marker.parent, **found["split"])


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
    """Yield the samples of data_prep's shards, in their order."""
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


def divide(classes: np.ndarray, *, held_out: int, labels: int, make_test: bool) -> dict[str, np.ndarray]:
    """Divide the places 0..N-1 of labelled samples into parts in which every class has its share.

    Args:
        classes: (N,) label of each sample.
        held_out: samples of the part 'held_out', and, if `make_test`, of the part 'test'.
        labels: samples of the part 'labelled', all of them in 'train' too.

    Raises:
        InputError: too few samples.
    """
    taken = held_out * (2 if make_test else 1)
    if held_out > LARGEST_SHARE * len(classes) or labels > len(classes) - taken or held_out < 1 or labels < 1:
        raise InputError(
            f"{len(classes)} training images are too few to hold out {held_out} (at most a fifth) and to take "
            f"{labels} labels from the rest"
        )
    order = _interleave_classes(classes)
    parts = {"held_out": order[:held_out]}
    if make_test:
        parts["test"] = order[held_out:taken]
    parts["train"], parts["labelled"] = order[taken:], order[taken : taken + labels]
    return {name: np.sort(places) for name, places in parts.items()}


def _interleave_classes(classes: np.ndarray) -> np.ndarray:
    """Return the places in an order of which every stretch holds every class by its share, shuffled in each class."""
    random = np.random.default_rng(SPLIT_SEED)
    positions = np.empty(len(classes))
    for label in np.unique(classes):
        places = np.flatnonzero(classes == label)
        positions[random.permutation(places)] = (np.arange(len(places)) + random.random()) / len(places)
    return np.argsort(positions, kind="stable")


def _choose(samples: Iterable[Sample], places: np.ndarray) -> Iterator[Sample]:
    wanted = set(places.tolist())
    return (sample for place, sample in enumerate(samples) if place in wanted)


def _write_samples(samples: Iterable[Sample], folder: Path) -> int:
    """Write shards whose samples are shuffled; return their number."""
    chosen = list(samples)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(chosen))
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(chosen), SAMPLES_PER_SHARD):
        path = folder / f"{folder.name}-{first // SAMPLES_PER_SHARD:04d}.tar"
        partial = path.with_suffix(".partial")
        with tarfile.open(partial, "w") as archive:
            for place in order[first : first + SAMPLES_PER_SHARD]:
                sample = chosen[place]
                _add_member(archive, f"{sample.key}.{sample.suffix}", sample.image)
                _add_member(archive, f"{sample.key}.cls", str(sample.label).encode())
        os.replace(partial, path)
    return len(chosen)


def _add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
