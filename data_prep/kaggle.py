"""ImageNet as Kaggle's "ImageNet Object Localization Challenge" ships it."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from data_prep.catalogue import ImageSet, Listing
from data_prep.devkit import WNID
from data_prep.errors import InputError
from data_prep.folders import find_images, list_class_folders
from data_prep.imagenet import LabelledFiles, assemble, list_wnid_folders


def read_kaggle(root: Path, *, limit_classes: int | None) -> ImageSet:
    """List the extracted download.

    Validation labels come from LOC_val_solution.csv (the first token of a row's prediction string), classes from
    LOC_synset_mapping.txt where it is there, otherwise from the training folders.

    Raises:
        InputError: no such layout, or a file of it is missing or damaged.
    """
    folders = (root / "ILSVRC" / "Data" / "CLS-LOC", root / "Data" / "CLS-LOC")
    images = next((folder for folder in folders if folder.is_dir()), None)
    if images is None:
        raise InputError(f"{root} is not Kaggle's layout: there is no ILSVRC/Data/CLS-LOC in it.")
    train = list_wnid_folders(images / "train") if (images / "train").is_dir() else None
    val = _list_kaggle_validation(images / "val", root) if (images / "val").is_dir() else None
    found = train or val
    if found is None:
        raise InputError(f"{images} has neither train nor val in it.")
    mapping = root / "LOC_synset_mapping.txt"
    wnids = _read_synset_mapping(mapping) if mapping.is_file() else sorted(found.wnids())
    return assemble(train, val, wnids=wnids, limit_classes=limit_classes)


def _read_synset_mapping(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    wnids = sorted({line.split()[0] for line in lines if line.strip()})
    strange = next((wnid for wnid in wnids if not WNID.fullmatch(wnid)), None)
    if strange is not None or not wnids:
        raise InputError(f"{path} does not begin its lines with a wnid such as n01440764.")
    return wnids


def _list_kaggle_validation(folder: Path, root: Path) -> LabelledFiles:
    if any(WNID.fullmatch(name) for name in list_class_folders(folder)):
        return list_wnid_folders(folder)
    solution = next(
        (path for path in (root / "LOC_val_solution.csv", root.parent / "LOC_val_solution.csv") if path.is_file()), None
    )
    if solution is None:
        raise InputError(
            f"the labels of the validation images are missing: there is no LOC_val_solution.csv in {root}."
        )
    wnid_of = _read_solution(solution)
    found = find_images(folder, "")
    found.require_readable()
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
