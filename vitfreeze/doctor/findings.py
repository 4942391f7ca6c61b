"""One answer of the doctor, and the table of all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table.

    Attributes:
        check: what was looked at.
        fit: whether it is well; None: not looked at, and `found` says why.
        found: what was seen.
        cure: what to do about it, if it is not well.
    """

    check: str
    fit: bool | None
    found: str
    cure: str = ""

    @property
    def mark(self) -> str:
        """The word in the table."""
        return {True: "ok", False: "RED", None: "-"}[self.fit]


def format_findings(findings: Sequence[Finding], *, colour: bool, width: int = 110) -> str:
    """Return the findings as a table, each red one with its cure below it."""
    column = max(len(finding.check) for finding in findings)
    paint = {True: GREEN, False: RED, None: ""}
    lines = []
    for finding in findings:
        mark = f"{finding.mark:<4}"
        if colour and finding.fit is not None:
            mark = f"{paint[finding.fit]}{mark}{PLAIN}"
        texts = _wrap(finding.found, width - column - 7)
        if finding.fit is False:
            texts += _wrap(f"-> {finding.cure}", width - column - 7)
        lines.append(f"{finding.check:<{column}}  {mark} {texts[0]}")
        lines += [f"{'':<{column}}       {text}" for text in texts[1:]]
    red = sum(finding.fit is False for finding in findings)
    lines += ["", f"{red} of {len(findings)} checks are red" if red else "fit to train"]
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 30), break_long_words=False, break_on_hyphens=False) or [""]
