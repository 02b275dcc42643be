"""Check whether the contents of samples decode, with the decoders that a run would use.

Each extension is decoded by the default decoder of :class:`~disttrain.data.decode.fields.Field`, or by one named for
it. Extensions without a decoder, and images if Pillow is missing, are skipped and recorded, so that a check reports
what it did not cover. Thread-safe. Cost: that of decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock

from disttrain.data.decode.fields import BadValuesError, Field, RawValues, decode
from disttrain.errors import ConfigError


class Decoders:
    """Decodes values to find those that fail.

    Args:
        named: decoders by extension, to override the default.

    Raises:
        ConfigError: a named decoder does not exist.

    Attributes:
        left_out: why each skipped extension is not checked.
    """

    def __init__(self, named: Mapping[str, str] | None = None) -> None:
        self._fields: dict[str, Field | None] = {ext: Field(ext, decoder=kind) for ext, kind in (named or {}).items()}
        self.left_out: dict[str, str] = {}
        self._lock = Lock()

    def wants(self, field: str) -> bool:
        """Return whether a field has a decoder that can fail."""
        with self._lock:
            if field not in self._fields:
                try:
                    self._fields[field] = Field(field)
                except ConfigError as error:
                    self._leave_out(field, error.what)
            found = self._fields[field]
            return found is not None and found.kind != "bytes"

    def faults(self, field: str, values: Sequence[bytes]) -> dict[int, str]:
        """Return why values of a field do not decode, by place."""
        declared = self._fields[field]
        assert declared is not None, f"field {field!r} has no decoder"
        try:
            decode(declared, RawValues([memoryview(value) for value in values]), draws=None)
        except BadValuesError as bad:
            return dict(bad.faults)
        except ConfigError as error:  # the decoder's library is missing
            with self._lock:
                self._leave_out(field, error.what)
        return {}

    def _leave_out(self, field: str, why: str) -> None:
        self._fields[field] = None
        self.left_out[field] = why
