"""What can go wrong, in one sentence each."""

from __future__ import annotations


class InputError(ValueError):
    """Something that was given cannot be used."""


class CellError(RuntimeError):
    """A command of a cell failed; the message names the command, what it said last and where the rest is."""


class StoppedError(RuntimeError):
    """A command of a cell was asked to stop and saved; the same call goes on from there."""
