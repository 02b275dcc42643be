"""Callbacks: checkpoints, stopping, randomness, records and progress."""

from disttrain.callbacks.checkpointing.callback import Checkpointing
from disttrain.callbacks.early_stopping import EarlyStopping
from disttrain.callbacks.ema import EMA
from disttrain.callbacks.records.sample_ledger import SampleLedger
from disttrain.callbacks.update_guard.callback import UpdateGuard

__all__ = ["EMA", "Checkpointing", "EarlyStopping", "SampleLedger", "UpdateGuard"]
