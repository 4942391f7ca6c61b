"""Figures as people read them: sizes and tables. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def format_bytes(count: float) -> str:
    """Return a size as people say it: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def find_nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that one meant, perhaps, by a misspelt one; empty if none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), "")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first a heading, in columns aligned to the right, the first to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
