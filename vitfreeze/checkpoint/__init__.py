"""Saving a run so that a whole checkpoint exists at every instant, finding it again, importing weights of others."""

from vitfreeze.checkpoint.folder import Checkpoint, CheckpointError, find_checkpoint, open_checkpoint
from vitfreeze.checkpoint.loading import load_checkpoint, load_engine, read_weights
from vitfreeze.checkpoint.saving import CheckpointWriter, SaveReport, SaveSchedule, save_engine
from vitfreeze.model import from_localmim, from_mae

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "SaveReport",
    "SaveSchedule",
    "find_checkpoint",
    "from_localmim",
    "from_mae",
    "load_checkpoint",
    "load_engine",
    "open_checkpoint",
    "read_weights",
    "save_engine",
]
