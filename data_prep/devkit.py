"""ImageNet's development kit: which classes there are, and the class of every validation image.

ILSVRC2012_ID, which the validation labels are written in, is 1-based and in another order than the labels of the
shards (indices among the sorted wnids): it is only ever looked up in meta.mat, never computed with.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np

from data_prep.errors import InputError

WNID = re.compile(r"n\d{8}")
META_SUFFIX = "data/meta.mat"
TRUTH_SUFFIX = "data/ILSVRC2012_validation_ground_truth.txt"
MAX_KIT_FILE_BYTES = 64 * 2**20


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
