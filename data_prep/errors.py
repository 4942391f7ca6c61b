"""What can go wrong, as exceptions whose message is one sentence for the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave (a path, an archive, a setting) cannot be used."""


class OutputError(RuntimeError):
    """The result cannot be written: a full disk, a folder that belongs to another command."""


class UndecodableError(ValueError):
    """One image cannot be decoded, or claims to be too large to try."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about a misspelt word: the nearest known one, if any is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
