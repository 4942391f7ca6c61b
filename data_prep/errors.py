"""What can go wrong, as exceptions whose message is one sentence for the user."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave (a path, an archive, a setting) cannot be used."""


class OutputError(RuntimeError):
    """The result cannot be written: a full disk, a folder that belongs to another command."""


class UndecodableError(ValueError):
    """One image cannot be decoded, or claims to be too large to try."""
