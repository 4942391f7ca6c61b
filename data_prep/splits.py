"""What every source of images is turned into before packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.catalogue import Catalogue
from data_prep.errors import InputError


@dataclass(frozen=True)
class ImageSet:
    """A data set to be packed: class names in label order, a catalogue per split, and what the user should know.

    `splits` has the keys "train", "validation" or both; `notes` are sentences on what was found in the source,
    and `drawn` says that the images are made here, so that their bytes depend on the encoder.
    """

    classes: Sequence[str]
    splits: Mapping[str, Catalogue]
    notes: Sequence[str] = ()
    drawn: bool = False


def choose_classes(classes: Sequence[str], limit: int | None) -> list[str]:
    """The first `limit` classes; all without a limit.

    Raises:
        InputError: there are not so many.
    """
    if limit is not None and not 1 <= limit <= len(classes):
        raise InputError(f"--limit-classes must be between 1 and {len(classes)}, the number of classes, not {limit}.")
    return list(classes[:limit])
