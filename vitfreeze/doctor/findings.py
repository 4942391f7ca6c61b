"""One answer of the doctor, and the table of all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"


@dataclass(frozen=True)
class Finding:
    """One line of the table, behind the name of its check.

    Attributes:
        fit: whether it is well; None: not looked at, and `found` says why.
        found: what was seen.
        cure: what to do about it, if it is not well.
    """

    fit: bool | None
    found: str = field(kw_only=True)
    cure: str = field(default="", kw_only=True)

    @property
    def mark(self) -> str:
        """The word in the table."""
        return {True: "ok", False: "RED", None: "-"}[self.fit]


def ok(found: str) -> Finding:
    """Return that something is well."""
    return Finding(True, found=found)


def red(found: str, *, cure: str) -> Finding:
    """Return that something is not well, and what to do about it."""
    return Finding(False, found=found, cure=cure)


def unseen(why: str) -> Finding:
    """Return why something was not looked at."""
    return Finding(None, found=why)


def format_findings(findings: Mapping[str, Finding], *, colour: bool, width: int = 110) -> str:
    """Return the findings, by the names of their checks, as a table; each red one with its cure below it."""
    column = max(map(len, findings))
    paint = {True: GREEN, False: RED, None: ""}
    lines = []
    for check, finding in findings.items():
        mark = f"{finding.mark:<4}"
        if colour and finding.fit is not None:
            mark = f"{paint[finding.fit]}{mark}{PLAIN}"
        texts = _wrap(finding.found, width - column - 7)
        if finding.fit is False:
            texts += _wrap(f"-> {finding.cure}", width - column - 7)
        lines.append(f"{check:<{column}}  {mark} {texts[0]}")
        lines += [f"{'':<{column}}       {text}" for text in texts[1:]]
    red = sum(finding.fit is False for finding in findings.values())
    lines += ["", f"{red} of {len(findings)} checks are red" if red else "fit to train"]
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 30), break_long_words=False, break_on_hyphens=False) or [""]
