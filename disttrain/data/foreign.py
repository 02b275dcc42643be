"""Decoders that are not disttrain's own: pickles, torch's files, and webdataset's decoders by name.

What unpickles can run code that is in the data, so each such decoder has to be named by the user before it is
called (:func:`disttrain.data.decode.check_safe`). ``torch`` loads weights only, which runs none. Of webdataset's
own (``webdataset:NAME``, see :mod:`webdataset.autodecode`) those count as safe that are known to be: ``npy`` and
``npz`` refuse arrays of Python objects there too, the pickles and ``pth`` (a ``torch.load`` of anything) do not.
Cost: value by value; the libraries are imported when a field asks for them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from disttrain.data.values import int64
from disttrain.errors import ConfigError, nearest

PREFIX: Final = "webdataset:"
PICKLES: Final = frozenset({"pickle"} | {PREFIX + name for name in ("pkl", "pickle", "pyd", "pth")})

_TEXT: Final = frozenset({"txt", "text", "transcript", "json", "jsn"})
_NUMBERS: Final = frozenset({"cls", "cls2", "index", "inx", "id"})
_ARRAYS: Final = frozenset({"ten", "tb", "npy", "npz"})
_PACKED: Final = {"mp": "msgpack", "msg": "msgpack", "cbor": "cbor"}
_POSTSCRIPT: Final = (b"%!PS", b"\xc5\xd0\xd3\xc6")

Read = Callable[[memoryview], Any]


def unpickles(kind: str) -> bool:
    """Whether a decoder can run code from the data. One of webdataset's that is not known counts as one that can."""
    if not kind.startswith(PREFIX):
        return kind in PICKLES
    name = kind.removeprefix(PREFIX)
    return name not in _TEXT | _NUMBERS | _ARRAYS and name not in _PACKED and name not in _image_names()


def check(ext: str, kind: str) -> None:
    """See to it that a decoder of webdataset's exists and has its libraries.

    Raises:
        ConfigError: it does not, or has not.
    """
    from webdataset import autodecode

    name = kind.removeprefix(PREFIX)
    known = _image_names() | set(autodecode.decoders)
    if name not in known:
        raise ConfigError(f"field {ext!r}: webdataset has no decoder {name!r}", mend=nearest(name, known))
    module, package = (_PACKED[name],) * 2 if name in _PACKED else ("PIL", "pillow")
    if (name in _PACKED or name in _image_names()) and find_spec(module) is None:
        raise ConfigError(f"field {ext!r}: {kind} needs {package}, which is missing", mend=f"pip install {package}")


def reader(kind: str) -> Read:
    """The function that decodes one value.

    Args:
        kind: ``pickle``, ``torch`` or ``webdataset:NAME``.
    """
    if kind == "pickle":
        return pickle.loads
    if kind == "torch":
        return _torch
    from webdataset import autodecode

    name = kind.removeprefix(PREFIX)
    if name in _image_names():
        handler = autodecode.ImageHandler(name)
        return lambda value: _tensor(handler("jpg", _no_postscript(value)))
    decode = autodecode.decoders[name]
    if name in _NUMBERS:
        return lambda value: torch.tensor(int64(decode(bytes(value))), dtype=torch.int64)
    return lambda value: _tensor(decode(bytes(value)))


def _image_names() -> set[str]:
    from webdataset import autodecode

    return set(autodecode.imagespecs)


def _torch(value: memoryview) -> Any:
    found = torch.load(io.BytesIO(value), map_location="cpu", weights_only=True)
    return found.detach() if isinstance(found, Tensor) else found


def _tensor(found: Any) -> Any:
    """An array as a tensor, as a batch of them would become one; anything else as it is."""
    if isinstance(found, np.ndarray) and found.dtype.kind in "biufc":
        return torch.from_numpy(np.array(found, order="C"))
    return found


def _no_postscript(value: memoryview) -> bytes:
    """The bytes of an image; Pillow would hand a PostScript file, whatever its name, to Ghostscript."""
    data = bytes(value)
    if data.startswith(_POSTSCRIPT):
        raise ValueError("a PostScript program, which is not run")
    return data
