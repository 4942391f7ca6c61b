"""ImageNet (ILSVRC 2012) from the archives as distributed, or from extracted folders.

Labels are indices among the sorted wnids.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.archives import list_inner, list_members
from data_prep.catalogue import Catalogue, FileCatalogue, ImageSet, Listing, choose_classes, clean_key
from data_prep.devkit import WNID, DevelopmentKit
from data_prep.errors import InputError
from data_prep.folders import find_images, list_class_folders, list_labelled
from data_prep.progress import show_progress
from data_prep.workers import run_tasks
from data_prep.writer import PRELOADED

SERIAL_BYTES = 2**30  # an archive smaller than this is listed before other processes could have started


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
    """Files of one split with the wnid of each; `num_ignored` others in the same place are no images of a class."""

    def __init__(self, root: Path, listing: Listing, wnids: Sequence[str], *, num_ignored: int = 0) -> None:
        self.root, self.listing, self.num_ignored, self._wnids = root, listing, num_ignored, wnids

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
        listing = self.listing.take(chosen)
        return FileCatalogue(
            listing,
            root=self.root,
            keys=[clean_key(Path(os.fsdecode(name)).stem) for name in listing.names],
            labels=[label_of[self._wnids[position]] for position in chosen],
            keep_folders=False,
        )


def assemble(
    train: LabelledFiles | None, val: LabelledFiles | None, *, wnids: Sequence[str], limit_classes: int | None
) -> ImageSet:
    """Give every file its label and keep the first `limit_classes` classes."""
    classes = choose_classes(wnids, limit_classes)
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    splits: dict[str, Catalogue] = {}
    notes = []
    for split, files in (("train", train), ("validation", val)):
        if files is None:
            continue
        splits[split] = files.catalogue(label_of, set(wnids))
        present = len(files.wnids() & label_of.keys())
        ignored = f"; {files.num_ignored} other files or folders are left alone" if files.num_ignored else ""
        notes.append(f"{split}: {len(splits[split])} images of {present} classes in {files.root}{ignored}")
    return ImageSet(classes, splits, notes)


def list_train(path: Path, *, workers: int) -> LabelledFiles:
    """List ILSVRC2012_img_train.tar, or the folder of class folders made from it."""
    if path.is_dir():
        return list_wnid_folders(path)
    members = list_members(path)
    inner = [member for member in members if member.name.endswith(".tar")]
    strange = next((member.name for member in inner if not WNID.fullmatch(_wnid_of_archive(member.name))), None)
    if not inner or strange:
        raise InputError(
            f"{path} is not the archive of the training images: it holds {strange or 'no inner archives'} where "
            "n01440764.tar and its like belong."
        )
    if sum(member.size for member in inner) < SERIAL_BYTES:
        workers = 1
    listed = []
    with show_progress("listing", total=len(inner), unit="archive") as advance:
        for listing in run_tasks(partial(list_inner, path=path), inner, workers=workers, preload=PRELOADED):
            listed.append(listing)
            advance(1, 0)
    return _join_inner(path, listed, num_ignored=len(members) - len(inner))


def _wnid_of_archive(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".tar")


def _join_inner(path: Path, listed: list[tuple[str, Listing]], *, num_ignored: int) -> LabelledFiles:
    parts = [part for _, part in listed]
    listing = Listing(
        names=[name for part in parts for name in part.names],
        sizes=np.concatenate([part.sizes for part in parts]),
        offsets=np.concatenate([part.offsets for part in parts]),
    )
    wnids = [_wnid_of_archive(name) for name, part in listed for _ in part.names]
    return LabelledFiles(path, listing, wnids, num_ignored=num_ignored)


def list_wnid_folders(root: Path) -> LabelledFiles:
    """List a folder of class folders named by wnid.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    present = list_class_folders(root)
    folders = [folder for folder in present if WNID.fullmatch(folder)]
    if not folders:
        raise InputError(f"{root} holds no class folder named like n01440764.")
    found, labels = list_labelled(root, folders)
    found.require_readable()
    num_ignored = len(present) - len(folders) + found.others.total()
    listing = Listing(found.names, found.sizes, None)
    return LabelledFiles(root, listing, [folders[label] for label in labels], num_ignored=num_ignored)


def list_validation(path: Path, kit: DevelopmentKit | None) -> LabelledFiles:
    """List ILSVRC2012_img_val.tar, the flat folder made from it, or a folder of class folders."""
    if path.is_dir() and any(WNID.fullmatch(folder) for folder in list_class_folders(path)):
        return list_wnid_folders(path)
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
        found.require_readable()
        return Listing(found.names, found.sizes, None)
    members = list_members(path)
    if not members or any(member.name.endswith(".tar") for member in members):
        raise InputError(f"{path} is not the archive of the validation images.")
    return Listing(
        names=[os.fsencode(member.name) for member in members],
        sizes=[member.size for member in members],
        offsets=[member.offset for member in members],
    )
