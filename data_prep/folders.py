"""Images in a tree of folders, one folder per class or without classes."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data_prep.catalogue import (
    NO_LABEL,
    Catalogue,
    FileCatalogue,
    ImageSet,
    Listing,
    choose_classes,
    clean_key,
    number_repeated,
)
from data_prep.errors import InputError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
SHOWN_KINDS = 3  # of files that are no images
TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "validation", "valid", "test")


@dataclass
class FoundImages:
    """Image files below a folder, as paths relative to the root with `/` between parts; sorted.

    `others` counts the files that are no images by their suffixes, and `unreadable` says of each file or folder that
    could not be looked at why not.
    """

    names: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def add(self, other: FoundImages) -> None:
        """Append what was found elsewhere below the same root."""
        self.names += other.names
        self.sizes += other.sizes
        self.others += other.others
        self.unreadable += other.unreadable

    def require_readable(self) -> None:
        """Refuse what is not whole; raises InputError."""
        if self.unreadable:
            raise InputError(f"cannot read {self.unreadable[0]}.")

    def describe_rest(self) -> list[str]:
        """What is there besides images, as ends of a sentence."""
        kinds = ", ".join(suffix or "no suffix" for suffix, _ in self.others.most_common(SHOWN_KINDS))
        words = [f"{self.others.total()} other files are left alone ({kinds})"] if self.others else []
        if self.unreadable:
            words.append(f"{len(self.unreadable)} files or folders cannot be read, the first: {self.unreadable[0]}")
        return words


def list_class_folders(root: Path) -> list[str]:
    """Names of the visible folders in `root`, sorted; a link to `root` itself or to a folder around it is none.

    Raises:
        InputError: there is no such folder, or it cannot be read.
    """
    around = _folders_around(root)
    try:
        with os.scandir(root) as entries:
            # entry.is_dir() raises for a link that leads to itself
            return sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and (
                    entry.is_dir(follow_symlinks=False)
                    or (entry.is_symlink() and os.path.isdir(entry.path) and _identify(entry.path) not in around)
                )
            )
    except OSError as error:
        raise InputError(f"cannot read the folder {root}: {error.strerror}.") from error


def find_images(root: Path, below: str, *, deep: bool = True) -> FoundImages:
    """All images in the folder `below` of `root`, and with `deep` in its folders.

    Links are followed, also out of the tree, but a folder is entered once only, by its own name rather than a link's,
    and a folder around the tree never; hidden files are not seen, and what cannot be read is counted.
    """
    found = FoundImages()
    around = _folders_around(root) | _folders_around(root / below)
    for path, size in sorted(_walk_files(root / below, around=around, deep=deep, unreadable=found.unreadable)):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            found.names.append(os.fsencode(PurePosixPath(os.path.relpath(path, root))))
            found.sizes.append(size)
        else:
            found.others[suffix] += 1
    return found


def _identify(folder: str | Path) -> tuple[int, int]:
    """What tells a folder from all others, whatever it is called; raises OSError."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _folders_around(folder: Path) -> set[tuple[int, int]]:
    """Identities of a folder and of all that it lies in; empty if there is no such folder."""
    try:
        real = folder.resolve()
        return {_identify(path) for path in (real, *real.parents)}
    except (OSError, RuntimeError):  # RuntimeError: a link to itself, in older versions of Python
        return set()


def _walk_files(
    start: Path, *, around: set[tuple[int, int]], deep: bool, unreadable: list[str]
) -> Iterator[tuple[str, int]]:
    seen: set[tuple[int, int]] = set()
    folders, links = [str(start)], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        try:
            identity = _identify(folder)
            if identity in seen:
                unreadable.append(f"{folder} (a link to a folder that was read already)")
                continue
            if identity in around and folder != str(start):
                unreadable.append(f"{folder} (a link to a folder around it)")
                continue
            seen.add(identity)
            with os.scandir(folder) as entries:
                visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=_name_of)
        except OSError as error:
            unreadable.append(f"{folder} ({error.strerror})")
            continue
        for entry in visible:
            try:
                if entry.is_dir():
                    if deep or (entry.is_symlink() and _identify(entry.path) in around):
                        (links if entry.is_symlink() else folders).append(entry.path)
                    continue
                status = entry.stat()  # raises for links that lead nowhere, or to themselves
                if stat.S_ISREG(status.st_mode):
                    yield entry.path, status.st_size
            except OSError as error:
                unreadable.append(f"{entry.path} ({error.strerror})")


def _name_of(entry: os.DirEntry[str]) -> str:
    return entry.name


def read_folder(root: Path, *, limit_classes: int | None = None, labels: bool = True) -> ImageSet:
    """List a tree of images, with or without train and val folders.

    Classes are the sorted names of the class folders; those of the training images where there are two splits. The
    key of a sample is class and path, joined by `_`. Without class folders, or with `labels` false, all images of a
    split are taken, however deep they lie, and have no label.

    Raises:
        InputError: the folder cannot be read or a split of it has no image, a validation class that is not among the
            training classes, two classes that are one folder, or a limit of classes where there are none.
    """
    roots, left_alone = find_split_folders(root, labels=labels)
    notes = [f"left alone: {', '.join(left_alone)} in {root}"] if left_alone else []
    if root not in roots.values():
        notes += [f"left alone: {what}" for what in find_images(root, "", deep=False).unreadable]
    classes = list_class_folders(next(iter(roots.values()))) if labels else []
    if not classes:
        if limit_classes is not None:
            raise InputError(f"--limit-classes needs class folders, and {root} is packed without labels.")
        unlabelled = {split: _read_unlabelled(split, folder, notes) for split, folder in roots.items()}
        _refuse_empty(unlabelled, notes)
        return ImageSet([], unlabelled, [*notes, "without labels: for pre-training, not for k-NN or fine-tuning"])
    chosen = choose_classes(classes, limit_classes)
    for folder in roots.values():
        names = list_class_folders(folder)
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise InputError(f"{folder} holds the class {unknown[0]}, which the training images do not have.")
        _refuse_twins(folder, names)
    labelled = {split: _read_labelled(split, folder, chosen, notes) for split, folder in roots.items()}
    _refuse_empty(labelled, notes)
    return ImageSet(chosen, labelled, notes)


def _refuse_twins(root: Path, names: Sequence[str]) -> None:
    """Refuse two class folders that are one by a link."""
    known: dict[tuple[int, int], str] = {}
    for name in names:
        other = known.setdefault(_identify(root / name), name)
        if other != name:
            raise InputError(
                f"the classes {other} and {name} in {root} are one folder, by a link, and its images would have two "
                "labels; remove one."
            )


def _refuse_empty(splits: Mapping[str, Catalogue], notes: Sequence[str]) -> None:
    for split, catalogue in splits.items():
        if not len(catalogue):
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise InputError(f"there is no image in the {split} split ({'; '.join(notes)}); images end in {kinds}.")


def find_split_folders(root: Path, *, labels: bool = True) -> tuple[dict[str, Path], list[str]]:
    """Which folder holds the images of which split, and the folders in `root` that are not used.

    A folder named train (or val, where there is no other folder) that holds folders is a split; otherwise `root` itself
    is the training split. So `train` may be a class too, next to `bus` and `car`. Without `labels`, and where there is
    no other folder, train and val are splits whatever they hold.

    Raises:
        InputError: a folder cannot be read.
    """
    folders = list_class_folders(root)
    only_splits = bool(folders) and all(name in (*TRAIN_FOLDERS, *VALIDATION_FOLDERS) for name in folders)
    flat = only_splits and not any(list_class_folders(root / name) for name in folders)
    splits = {}
    for split, names in (("train", TRAIN_FOLDERS), ("validation", VALIDATION_FOLDERS)):
        found = [name for name in names if name in folders]
        if found := [name for name in found if not labels or flat or list_class_folders(root / name)]:
            splits[split] = root / found[0]
    if "train" in splits or (splits and len(folders) == 1):
        used = {path.name for path in splits.values()}
        return splits, [name for name in folders if name not in used]
    return {"train": root}, []


def list_labelled(root: Path, folders: Sequence[str]) -> tuple[FoundImages, list[int]]:
    """The images in class folders, and the position of each one's folder."""
    whole, labels = FoundImages(), list[int]()
    for label, folder in enumerate(folders):
        images = find_images(root, folder)
        labels += [label] * len(images.names)
        whole.add(images)
    return whole, labels


def _read_labelled(split: str, root: Path, classes: list[str], notes: list[str]) -> FileCatalogue:
    found, labels = list_labelled(root, classes)
    loose = find_images(root, "", deep=False)
    found.others += loose.others
    found.unreadable += loose.unreadable
    empty = sorted(set(range(len(classes))) - set(labels))
    missing = f"; no image of {len(empty)} of them, as of {classes[empty[0]]}" if empty else ""
    notes.append(f"{split}: {len(labels)} images of {len(classes)} classes in {root}{missing}" + _tell_rest(found))
    if loose.names:
        notes.append(
            f"{split}: {len(loose.names)} images beside the class folders are left out, as "
            f"{os.fsdecode(loose.names[0])}; --no-labels packs all images without classes"
        )
    return _make_catalogue(root, found, labels, notes)


def _read_unlabelled(split: str, root: Path, notes: list[str]) -> FileCatalogue:
    found = find_images(root, "")
    notes.append(f"{split}: {len(found.names)} images in {root}" + _tell_rest(found))
    return _make_catalogue(root, found, [NO_LABEL] * len(found.names), notes)


def _tell_rest(found: FoundImages) -> str:
    return "".join(f"; {words}" for words in found.describe_rest())


def _make_catalogue(root: Path, found: FoundImages, labels: list[int], notes: list[str]) -> FileCatalogue:
    names = [os.fsdecode(name) for name in found.names]
    keys = number_repeated([_make_key(name) for name in names])
    dotted = [position for position, name in enumerate(names) if "." in os.path.splitext(name)[0]]
    if dotted:
        first = dotted[0]
        notes.append(
            f"{len(dotted)} names hold further dots, at which WebDataset would end a key; the keys have _ in their "
            f"place, as {keys[first].decode()} of {names[first]}"
        )
    listing = Listing(found.names, found.sizes, None)
    return FileCatalogue(listing, root=root, keys=keys, labels=labels, keep_folders=True)


def _make_key(name: str) -> bytes:
    """`cat/03.jpg` -> `cat_03`, and `n01440764/n01440764_10026.JPEG` -> `n01440764_10026`."""
    path = PurePosixPath(name)
    parts = [*path.parts[:-1], path.stem]
    if len(parts) > 1 and path.stem.startswith(f"{parts[0]}_"):
        parts = parts[1:]
    return clean_key("_".join(parts))
