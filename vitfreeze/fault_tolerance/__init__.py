"""What a run does about requests to stop, hangs, losses that are not finite, and saving in time."""

from vitfreeze.fault_tolerance.guard import (
    EXIT_FAILED,
    EXIT_HUNG,
    EXIT_STOPPED,
    RunGuard,
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
]
