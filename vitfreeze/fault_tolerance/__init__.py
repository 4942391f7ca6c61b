"""What a run does about requests to stop, hangs, losses that are not finite, and saving in time."""

from vitfreeze.fault_tolerance.guard import (
    EXIT_FAILED,
    EXIT_HUNG,
    EXIT_STOPPED,
    RunGuard,
    load_local_state,
    local_state,
    report_start,
    schedule_state,
)
from vitfreeze.fault_tolerance.losses import LossGuard, RunFailedError
from vitfreeze.fault_tolerance.signals import StopSignals
from vitfreeze.fault_tolerance.watchdog import Watchdog

__all__ = [
    "EXIT_FAILED",
    "EXIT_HUNG",
    "EXIT_STOPPED",
    "LossGuard",
    "RunFailedError",
    "RunGuard",
    "StopSignals",
    "Watchdog",
    "load_local_state",
    "local_state",
    "report_start",
    "schedule_state",
]
