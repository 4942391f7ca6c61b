"""JSON that others wrote, or a disk has damaged."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return what the text says; raises ValueError if it is no JSON, or is nested too deeply for a program to read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
