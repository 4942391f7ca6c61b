"""ImageNet (ILSVRC 2012) in the layouts it is met in: the archives as distributed, extracted folders, Kaggle's tree.

Labels are indices among the sorted wnids. Two other numberings invite mistakes: ILSVRC2012_ID in the development kit
(1-based and in another order), which the validation labels are written in, and the order of the archive.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_prep.archives import InnerArchive, InnerListing, Member, list_inner, list_members
from data_prep.catalogue import Catalogue, FileCatalogue, Listing, clean_key
from data_prep.errors import InputError
from data_prep.folders import find_images, list_class_folders
from data_prep.splits import ImageSet
from data_prep.workers import run_tasks
from data_prep.writer import PRELOADED

WNID = re.compile(r"n\d{8}")
META_SUFFIX = "data/meta.mat"
TRUTH_SUFFIX = "data/ILSVRC2012_validation_ground_truth.txt"
MAX_KIT_FILE_BYTES = 64 * 2**20
SERIAL_BYTES = 2**30  # an archive smaller than this is listed before other processes could have started


class DevelopmentKit:
    """ILSVRC2012_devkit_t12.tar.gz, or the folder extracted from it: the classes and the validation labels."""

    def __init__(self, path: Path) -> None:
        """Read meta.mat and the validation labels.

        Raises:
            InputError: not there, damaged, or without one of the two files.
        """
        meta, truth = _read_kit_files(path)
        self.wnid_of_id = _leaf_wnids(meta, path)
        self.wnids = sorted(self.wnid_of_id.values())
        try:
            self.validation_ids = [int(line) for line in truth.split()]
        except ValueError as error:
            raise InputError(f"the validation labels in {path} are not integers ({error}).") from error

    def validation_wnids(self, count: int) -> list[str]:
        """The wnid of every validation image in the order of their sorted file names.

        Raises:
            InputError: the number of labels is not `count`, or one is no known ILSVRC2012_ID.
        """
        if len(self.validation_ids) != count:
            raise InputError(
                f"the development kit labels {len(self.validation_ids)} validation images, but there are {count}."
            )
        unknown = next((number for number in self.validation_ids if number not in self.wnid_of_id), None)
        if unknown is not None:
            raise InputError(f"the development kit gives the label {unknown}, which meta.mat does not list as a class.")
        return [self.wnid_of_id[number] for number in self.validation_ids]


def _read_kit_files(path: Path) -> tuple[bytes, str]:
    suffixes = (META_SUFFIX, TRUTH_SUFFIX)
    try:
        if path.is_dir():
            found = {suffix: (path / suffix).read_bytes() for suffix in suffixes if (path / suffix).is_file()}
        else:
            with tarfile.open(path, "r:*") as archive:
                found = {}
                for info in archive:
                    suffix = next((suffix for suffix in suffixes if info.name.endswith(suffix)), None)
                    file = archive.extractfile(info) if suffix and info.size <= MAX_KIT_FILE_BYTES else None
                    if suffix and file is not None:
                        found[suffix] = file.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not ILSVRC2012_devkit_t12.tar.gz: it is no whole tar archive.") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    missing = [suffix for suffix in suffixes if suffix not in found]
    if missing:
        raise InputError(f"{path} holds no {missing[0]}: is it the development kit of tasks 1 and 2?")
    return found[META_SUFFIX], found[TRUTH_SUFFIX].decode("ascii", "replace")


def _leaf_wnids(meta: bytes, path: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> wnid for the synsets without children, which are the classes."""
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    except Exception as error:  # scipy raises many kinds on a damaged file
        raise InputError(f"meta.mat in {path} cannot be understood ({type(error).__name__}: {error}).") from error
    strange = next((wnid for wnid in leaves.values() if not WNID.fullmatch(wnid)), None)
    if strange is not None or not leaves:
        raise InputError(f"meta.mat in {path} lists {strange or 'no class'} where a wnid such as n01440764 belongs.")
    return leaves


def read_imagenet(
    *, train: Path | None, val: Path | None, devkit: Path | None, limit_classes: int | None, workers: int
) -> ImageSet:
    """List ImageNet from archives or extracted folders, either split or both.

    Classes are those of the development kit where it is given, otherwise those of the training images (or of the
    validation folders).

    Raises:
        InputError: something is missing, damaged or does not fit together.
    """
    kit = DevelopmentKit(devkit) if devkit else None
    train_images = list_train(train, workers=workers) if train else None
    val_images = list_validation(val, kit) if val else None
    found = train_images or val_images
    if found is None:
        raise InputError("give --train, --val or both.")
    wnids = kit.wnids if kit else sorted(found.wnids())
    return assemble(train_images, val_images, wnids=wnids, limit_classes=limit_classes)


class LabelledFiles:
    """Files of one split with the wnid of each."""

    def __init__(self, root: Path, listing: Listing, wnids: Sequence[str]) -> None:
        self.root, self.listing, self._wnids = root, listing, wnids

    def wnids(self) -> set[str]:
        return set(self._wnids)

    def catalogue(self, label_of: Mapping[str, int], known: set[str]) -> FileCatalogue:
        """The files whose class has a label.

        Raises:
            InputError: a wnid that is not among the `known` ones, or two files of one name.
        """
        unknown = sorted(self.wnids() - known)
        if unknown:
            raise InputError(
                f"{self.root} holds the class {unknown[0]}, which is not among the {len(known)} known ones."
            )
        chosen = [position for position, wnid in enumerate(self._wnids) if wnid in label_of]
        offsets = self.listing.offsets
        names = [self.listing.names[position] for position in chosen]
        return FileCatalogue(
            Listing(
                names=names,
                sizes=np.asarray(self.listing.sizes, dtype=np.int64)[chosen],
                offsets=None if offsets is None else np.asarray(offsets, dtype=np.int64)[chosen],
            ),
            root=self.root,
            keys=[clean_key(Path(os.fsdecode(name)).stem) for name in names],
            labels=[label_of[self._wnids[position]] for position in chosen],
            keep_folders=False,
        )


def assemble(
    train: LabelledFiles | None, val: LabelledFiles | None, *, wnids: Sequence[str], limit_classes: int | None
) -> ImageSet:
    """Give every file its label and keep the first `limit_classes` classes."""
    if limit_classes is not None and not 1 <= limit_classes <= len(wnids):
        raise InputError(
            f"--limit-classes must be between 1 and {len(wnids)}, the number of classes, not {limit_classes}."
        )
    classes = list(wnids[:limit_classes])
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    splits: dict[str, Catalogue] = {}
    notes = []
    for split, files in (("train", train), ("validation", val)):
        if files is None:
            continue
        splits[split] = files.catalogue(label_of, set(wnids))
        present = len(files.wnids() & label_of.keys())
        notes.append(f"{split}: {len(splits[split])} images of {present} classes in {files.root}")
    return ImageSet(classes, splits, notes)


def list_train(path: Path, *, workers: int) -> LabelledFiles:
    """List ILSVRC2012_img_train.tar, or the folder of class folders made from it."""
    if path.is_dir():
        return _list_class_folders(path)
    inner = [member for member in list_members(path) if member.name.endswith(".tar")]
    strange = next((member.name for member in inner if not WNID.fullmatch(_inner_wnid(member))), None)
    if not inner or strange:
        raise InputError(
            f"{path} is not the archive of the training images: it holds {strange or 'no inner archives'} where "
            "n01440764.tar and its like belong."
        )
    if sum(member.size for member in inner) < SERIAL_BYTES:
        workers = 1
    tasks = (InnerArchive(path, member) for member in inner)
    listed = list(run_tasks(list_inner, tasks, workers=workers, preload=PRELOADED))
    return _join_inner(path, listed)


def _inner_wnid(member: Member) -> str:
    return member.name.rpartition("/")[2].removesuffix(".tar")


def _join_inner(path: Path, listed: list[InnerListing]) -> LabelledFiles:
    names: list[bytes] = []
    wnids: list[str] = []
    for inner in listed:
        wnid = inner.name.rpartition("/")[2].removesuffix(".tar")
        names += inner.image_names
        wnids += [wnid] * len(inner.image_names)
    return LabelledFiles(
        path,
        Listing(
            names=names,
            sizes=np.concatenate([inner.sizes for inner in listed]),
            offsets=np.concatenate([inner.offsets for inner in listed]),
        ),
        wnids,
    )


def _list_class_folders(root: Path) -> LabelledFiles:
    names: list[bytes] = []
    sizes: list[int] = []
    wnids: list[str] = []
    folders = [folder for folder in list_class_folders(root) if WNID.fullmatch(folder)]
    if not folders:
        raise InputError(f"{root} holds no class folder named like n01440764.")
    for wnid in folders:
        found = find_images(root, wnid)
        names += found.names
        sizes += found.sizes
        wnids += [wnid] * len(found.names)
    return LabelledFiles(root, Listing(names, sizes, None), wnids)


def list_validation(path: Path, kit: DevelopmentKit | None) -> LabelledFiles:
    """List ILSVRC2012_img_val.tar, the flat folder made from it, or a folder of class folders."""
    if path.is_dir() and any(WNID.fullmatch(folder) for folder in list_class_folders(path)):
        return _list_class_folders(path)
    if kit is None:
        raise InputError(f"the images in {path} carry no class: give the development kit with --devkit.")
    listing = _list_flat(path)
    order = sorted(range(len(listing.names)), key=lambda position: listing.names[position].rpartition(b"/")[2])
    wnids = [""] * len(order)
    for position, wnid in zip(order, kit.validation_wnids(len(order)), strict=True):
        wnids[position] = wnid
    return LabelledFiles(path, listing, wnids)


def _list_flat(path: Path) -> Listing:
    if path.is_dir():
        found = find_images(path, "")
        return Listing(found.names, found.sizes, None)
    members = list_members(path)
    if not members or any(member.name.endswith(".tar") for member in members):
        raise InputError(f"{path} is not the archive of the validation images.")
    return Listing(
        names=[os.fsencode(member.name) for member in members],
        sizes=[member.size for member in members],
        offsets=[member.offset for member in members],
    )


def read_kaggle(root: Path, *, limit_classes: int | None) -> ImageSet:
    """List Kaggle's "ImageNet Object Localization Challenge" as extracted.

    Validation labels come from LOC_val_solution.csv (the first token of a row's prediction string), classes from
    LOC_synset_mapping.txt where it is there, otherwise from the training folders.

    Raises:
        InputError: no such layout, or a file of it is missing or damaged.
    """
    images = next((folder for folder in _kaggle_image_folders(root) if folder.is_dir()), None)
    if images is None:
        raise InputError(f"{root} is not Kaggle's layout: there is no ILSVRC/Data/CLS-LOC in it.")
    train = _list_class_folders(images / "train") if (images / "train").is_dir() else None
    val = _list_kaggle_validation(images / "val", root) if (images / "val").is_dir() else None
    found = train or val
    if found is None:
        raise InputError(f"{images} has neither train nor val in it.")
    mapping = root / "LOC_synset_mapping.txt"
    wnids = _read_synset_mapping(mapping) if mapping.is_file() else sorted(found.wnids())
    return assemble(train, val, wnids=wnids, limit_classes=limit_classes)


def _kaggle_image_folders(root: Path) -> list[Path]:
    return [root / "ILSVRC" / "Data" / "CLS-LOC", root / "Data" / "CLS-LOC"]


def _read_synset_mapping(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    wnids = sorted({line.split()[0] for line in lines if line.strip()})
    strange = next((wnid for wnid in wnids if not WNID.fullmatch(wnid)), None)
    if strange is not None or not wnids:
        raise InputError(f"{path} does not begin its lines with a wnid such as n01440764.")
    return wnids


def _list_kaggle_validation(folder: Path, root: Path) -> LabelledFiles:
    if any(WNID.fullmatch(name) for name in list_class_folders(folder)):
        return _list_class_folders(folder)
    solution = next(
        (path for path in (root / "LOC_val_solution.csv", root.parent / "LOC_val_solution.csv") if path.is_file()), None
    )
    if solution is None:
        raise InputError(
            f"the labels of the validation images are missing: there is no LOC_val_solution.csv in {root}."
        )
    wnid_of = _read_solution(solution)
    found = find_images(folder, "")
    stems = [Path(os.fsdecode(name)).stem for name in found.names]
    unlabelled = next((stem for stem in stems if stem not in wnid_of), None)
    if unlabelled is not None:
        raise InputError(f"{solution} gives no class for {unlabelled}.")
    return LabelledFiles(folder, Listing(found.names, found.sizes, None), [wnid_of[stem] for stem in stems])


def _read_solution(path: Path) -> dict[str, str]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if len(row) >= 2 and row[0] != "ImageId"]
    try:
        wnid_of = {row[0]: row[1].split()[0] for row in rows}
    except IndexError as error:
        raise InputError(f"{path} has a row without a prediction string.") from error
    strange = next((wnid for wnid in wnid_of.values() if not WNID.fullmatch(wnid)), None)
    if strange is not None:
        raise InputError(f"{path} gives the class {strange}, which is no wnid such as n01440764.")
    return wnid_of
