"""Errors and records for samples that cannot be used.

A sample is bad if it lacks a field, does not decode, or is rejected by a transform. With ``error`` the run stops and
names the sample. With ``skip`` the sample keeps its place in the global batch with weight 0, so order and
accumulation do not change and the gradient is that of the good samples. Its values are copied from the next good
sample, which depends on the data alone. All ranks decide together how many samples may be skipped
(:mod:`disttrain.callbacks.bad_sample_report`).
"""

from __future__ import annotations

from typing import NamedTuple

from disttrain.errors import DataError, DecodeError


class BadSampleError(ValueError):
    """Raised by a transform for a sample that cannot be used; the message says why."""


class FilteredSampleError(Exception):
    """Raised by a transform for a valid sample that should not be used.

    The sample keeps its place in the global batch with weight 0. It is counted, but not as a bad sample.
    """


class BadSample(NamedTuple):
    """A sample that cannot be used, and why.

    Attributes:
        shard: path or URL of its shard.
        key: its key.
        field: name of the faulty field; empty if a transform rejected the sample.
        offset: byte offset of that field in the shard, -1 if the sample lacks it.
        reason: what is wrong.
        hint: hint for the error message.
    """

    shard: str
    key: str
    field: str
    offset: int
    reason: str
    hint: str

    def __str__(self) -> str:
        at = f" at byte {self.offset}" if self.offset >= 0 else ""
        return f"shard {self.shard}{at}: sample {self.key!r}{self.reason}"

    def error(self, others: int = 0) -> DataError:
        """Return the error for this sample; ``others`` is how many more bad samples the read found."""
        kind = DecodeError if self.offset >= 0 else DataError
        more = f" (and {others} more in this read)" if others else ""
        return kind(f"{self}{more}", hint=f"{self.hint}; or set data.on_bad_sample to skip")
