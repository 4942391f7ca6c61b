"""What every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with reference figures and photographs that lies beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"PARITY AND REAL-IMAGE TESTS ARE NOT RUN: no folder {SHARED}")
    return SHARED
