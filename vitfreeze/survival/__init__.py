"""What a run does about requests to stop, hangs, losses that are not finite, and saving in time."""

from vitfreeze.survival.keeper import (
    EXIT_FAILED,
    EXIT_HUNG,
    EXIT_STOPPED,
    Keeper,
    load_local_state,
    local_state,
    report_start,
    schedule_state,
)
from vitfreeze.survival.losses import LossGuard, RunFailedError
from vitfreeze.survival.signals import StopSignals
from vitfreeze.survival.watchdog import Watchdog

__all__ = [
    "EXIT_FAILED",
    "EXIT_HUNG",
    "EXIT_STOPPED",
    "Keeper",
    "LossGuard",
    "RunFailedError",
    "StopSignals",
    "Watchdog",
    "load_local_state",
    "local_state",
    "report_start",
    "schedule_state",
]
