"""How many threads a process may take. No torch: OpenMP reads the answer when torch is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping


def count_threads(environment: Mapping[str, str], *, cores: int) -> int:
    """Return the cores of this machine for each rank on it, at least one; without a launcher there is one rank."""
    # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher LOCAL_SIZE.
    ranks = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)
    return max(1, cores // max(1, ranks))


def limit_threads() -> None:
    """Set OMP_NUM_THREADS for this process and its workers, unless it is set; as the scripts in launch/ do."""
    if not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(count_threads(os.environ, cores=len(os.sched_getaffinity(0))))
