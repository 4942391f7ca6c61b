"""DeepSpeed, and the parameter groups that implement FreezeOut. The only room that imports deepspeed."""

from vitfreeze.engine.fake_ranks import CollectiveClock, join_fake_ranks
from vitfreeze.engine.freezing import EngineState, FreezeEvent, FreezingEngine
from vitfreeze.engine.launch import join_ranks
from vitfreeze.engine.settings import DeepSpeedSettings, best_ds_config, read_settings, supports
from vitfreeze.engine.slices import STATE_KEYS, GroupState, SliceReader

__all__ = [
    "STATE_KEYS",
    "CollectiveClock",
    "DeepSpeedSettings",
    "EngineState",
    "FreezeEvent",
    "FreezingEngine",
    "GroupState",
    "SliceReader",
    "best_ds_config",
    "join_fake_ranks",
    "join_ranks",
    "read_settings",
    "supports",
]
