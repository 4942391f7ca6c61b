"""What every source of images is turned into before packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.catalogue import Catalogue


@dataclass(frozen=True)
class ImageSet:
    """A data set to be packed: class names in label order, a catalogue per split, and what the user should know.

    `splits` has the keys "train", "validation" or both; `notes` are sentences on what was found in the source,
    and `drawn` says that the images are made here, so that their bytes depend on the encoder.
    """

    classes: Sequence[str]
    splits: dict[str, Catalogue]
    notes: Sequence[str] = ()
    drawn: bool = False
