"""What happens around the steps: stopping, checkpoints, randomness, records and progress."""

from disttrain.callbacks.checkpointing import Checkpointing
from disttrain.callbacks.early_stopping import EarlyStopping
from disttrain.callbacks.ema import EMA
from disttrain.callbacks.guard import UpdateGuard
from disttrain.callbacks.ledger import SampleLedger

__all__ = ["EMA", "Checkpointing", "EarlyStopping", "SampleLedger", "UpdateGuard"]
