"""Whether the contents of samples decode, by the decoders that a run would use.

Each extension is decoded as :class:`~disttrain.data.decode.Field` would by default, or by a decoder that is named
for it. Extensions without one, and images where Pillow is missing, are not looked at; they are counted, so that
a check says what it left out. Safe to use from several threads. Cost: that of decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock

from disttrain.data.decode import BadValuesError, Field, RawValues, decode
from disttrain.errors import ConfigError


class Decoders:
    """Decodes values to see whether it can be done.

    Args:
        named: decoders by extension, where it is not the one that the extension names.

    Raises:
        ConfigError: a decoder that is named does not exist.

    Attributes:
        left_out: why the values of an extension are not looked at.
    """

    def __init__(self, named: Mapping[str, str] | None = None) -> None:
        self._fields: dict[str, Field | None] = {ext: Field(ext, decoder=kind) for ext, kind in (named or {}).items()}
        self.left_out: dict[str, str] = {}
        self._lock = Lock()

    def wants(self, field: str) -> bool:
        """Whether there is a decoder for a field, and one that can fail."""
        with self._lock:
            if field not in self._fields:
                try:
                    self._fields[field] = Field(field)
                except ConfigError as error:
                    self._leave_out(field, error.what)
            found = self._fields[field]
            return found is not None and found.kind != "bytes"

    def faults(self, field: str, values: Sequence[bytes]) -> dict[int, str]:
        """Why values of a field do not decode, by their place."""
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
