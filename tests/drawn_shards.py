"""Shards of drawn images for tests, made as the demo makes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def draw_shards(folder: Path, *, samples: int) -> Path:
    """Images of 64 pixels and 12 classes, four fifths of them for training."""
    command = [sys.executable, "-m", "data_prep", "demo", "--out", str(folder), "--samples", str(samples)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=120)
    return folder
