"""What becomes of a sample that cannot be used: an error, or a mask and a record.

A bad sample lacks a field, does not decode, or is refused by a transform. Under ``error`` the run stops and
names it. Under ``skip`` it keeps its place in the global batch with weight 0, so that neither order nor
accumulation changes and the gradient is that of the good samples; its values are those of the next good
sample, which is a function of the data alone. How many may be skipped is decided by all ranks together
(:mod:`disttrain.callbacks.bad_samples`).
"""

from __future__ import annotations

from typing import NamedTuple

from disttrain.errors import DataError, DecodeError


class BadSampleError(ValueError):
    """Raised by a transform for a sample that cannot be used; the text says why."""


class FilteredSampleError(Exception):
    """Raised by a transform for a sample that is not wanted, though nothing is wrong with it.

    It keeps its place in the global batch with weight 0. It is counted, but not as a bad sample.
    """


class BadSample(NamedTuple):
    """A sample that cannot be used, and why.

    Attributes:
        shard: path or URL of its shard.
        key: its key.
        field: name of the field at fault, empty where a transform refused the sample.
        offset: where that field's bytes begin in the shard, -1 where the sample lacks it.
        reason: what is wrong.
        mend: how to mend it.
    """

    shard: str
    key: str
    field: str
    offset: int
    reason: str
    mend: str

    def __str__(self) -> str:
        at = f" at byte {self.offset}" if self.offset >= 0 else ""
        return f"shard {self.shard}{at}: sample {self.key!r}{self.reason}"

    def error(self, others: int = 0) -> DataError:
        """The error that names it, and says how many others were found with it."""
        kind = DecodeError if self.offset >= 0 else DataError
        more = f" (and {others} more in this read)" if others else ""
        return kind(f"{self}{more}", mend=f"{self.mend}; or set data.on_bad_sample to skip")
