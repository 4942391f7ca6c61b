"""Images in a tree of folders, one folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from data_prep.catalogue import Catalogue, FileCatalogue, ImageSet, Listing, choose_classes, clean_key, number_repeated
from data_prep.errors import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "validation", "valid", "test")


def list_class_folders(root: Path) -> list[str]:
    """Names of the visible folders in `root`, sorted.

    Raises:
        InputError: there is no such folder, or it cannot be read.
    """
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read the folder {root}: {error.strerror}.") from error


def find_images(root: Path, below: str) -> tuple[Listing, int]:
    """All images in the folder `below` of `root` and in its folders, sorted, and the number of other files there.

    Names are relative to the root with `/` between parts; links are followed, hidden files are not seen.

    Raises:
        InputError: a folder cannot be read.
    """
    files = sorted(_walk_files(root / below, seen=set()))
    images = [(path, size) for path, size in files if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES]
    names = [os.fsencode(PurePosixPath(os.path.relpath(path, root))) for path, _ in images]
    return Listing(names, [size for _, size in images], None), len(files) - len(images)


def _walk_files(folder: str | Path, *, seen: set[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # links that go round in a circle
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in visible:
            if entry.is_dir():
                yield from _walk_files(entry.path, seen=seen)
            elif entry.is_file():
                yield entry.path, entry.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {error.filename or folder}: {error.strerror}.") from error


def read_folder(root: Path, *, limit_classes: int | None) -> ImageSet:
    """List a class-per-folder tree, with or without train and val folders above the classes.

    Classes are the sorted names of the class folders; those of the training images where there are two splits. The
    key of a sample is class and path, joined by `_`.

    Raises:
        InputError: no such layout, or a validation class that is not among the training classes.
    """
    roots, left_alone = find_split_folders(root)
    classes = list_class_folders(next(iter(roots.values())))
    chosen = choose_classes(classes, limit_classes)
    splits: dict[str, Catalogue] = {}
    notes = [f"left alone: {', '.join(left_alone)} in {root}"] if left_alone else []
    for split, folder in roots.items():
        unknown = sorted(set(list_class_folders(folder)) - set(classes))
        if unknown:
            raise InputError(f"{folder} holds the class {unknown[0]}, which the training images do not have.")
        splits[split], num_other = _read_split(folder, chosen)
        others = f"; {num_other} other files are left alone" if num_other else ""
        notes.append(f"{split}: {len(splits[split])} images of {len(chosen)} classes in {folder}{others}")
    return ImageSet(chosen, splits, notes)


def find_split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Which folder holds the classes of which split, and the folders in `root` that are not used.

    A folder named train (or val, where there is no other folder) that holds folders is a split; otherwise `root` itself
    holds the classes, all of them for training. So `train` may be a class too, next to `bus` and `car`.

    Raises:
        InputError: no class folders.
    """
    folders = list_class_folders(root)
    splits = {}
    for split, names in (("train", TRAIN_FOLDERS), ("validation", VALIDATION_FOLDERS)):
        found = [name for name in names if name in folders and list_class_folders(root / name)]
        if found:
            splits[split] = root / found[0]
    if "train" in splits or (splits and len(folders) == 1):
        used = {path.name for path in splits.values()}
        return splits, [name for name in folders if name not in used]
    if not folders:
        raise InputError(f"{root} holds no class folders.")
    return {"train": root}, []


def list_labelled(root: Path, folders: Sequence[str]) -> tuple[Listing, list[int], int]:
    """The images in class folders, the position of each one's folder, and how many other files are there.

    Raises:
        InputError: a folder cannot be read.
    """
    found = [find_images(root, folder) for folder in folders]
    names = [name for images, _ in found for name in images.names]
    sizes = [size for images, _ in found for size in images.sizes]
    labels = [label for label, (images, _) in enumerate(found) for _ in images.names]
    return Listing(names, sizes, None), labels, sum(num_other for _, num_other in found)


def _read_split(root: Path, classes: list[str]) -> tuple[FileCatalogue, int]:
    listing, labels, num_other = list_labelled(root, classes)
    keys = number_repeated([_make_key(os.fsdecode(name)) for name in listing.names])
    return FileCatalogue(listing, root=root, keys=keys, labels=labels, keep_folders=True), num_other


def _make_key(name: str) -> bytes:
    """`cat/03.jpg` -> `cat_03`, and `n01440764/n01440764_10026.JPEG` -> `n01440764_10026`."""
    path = PurePosixPath(name)
    parts = [*path.parts[:-1], path.stem]
    if path.stem.startswith(f"{parts[0]}_"):
        parts = parts[1:]
    return clean_key("_".join(parts))
