"""Third-party decoders: pickles, torch files, and webdataset's decoders by name.

Unpickling can run code from the data, so the user must explicitly allow each decoder that unpickles
(:func:`disttrain.data.decode.fields.check_safe`). ``torch`` uses ``weights_only=True``, which runs no code.
webdataset's decoders (``webdataset:NAME``, see :mod:`webdataset.autodecode`) count as safe only if they are known to
be: its ``npy`` and ``npz`` reject arrays of Python objects; its pickle decoders and ``pth`` (an unrestricted
``torch.load``) run code. Cost: decodes value by value; libraries are imported only when a field needs them.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from disttrain.data.decode.images import MAX_PIXELS
from disttrain.data.decode.values import MAX_EXPANDED, one_cls
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
    """Return whether a decoder can run code from the data; an unknown webdataset decoder counts as one that can."""
    if not kind.startswith(PREFIX):
        return kind in PICKLES
    name = kind.removeprefix(PREFIX)
    return name not in _TEXT | _NUMBERS | _ARRAYS and name not in _PACKED and name not in _image_names()


def check(ext: str, kind: str) -> None:
    """Check that a webdataset decoder exists and its libraries are installed.

    Raises:
        ConfigError: the decoder is unknown, or a library is missing.
    """
    from webdataset import autodecode

    name = kind.removeprefix(PREFIX)
    known = _image_names() | set(autodecode.decoders)
    if name not in known:
        raise ConfigError(f"field {ext!r}: webdataset has no decoder {name!r}", hint=nearest(name, known))
    module, package = (_PACKED[name],) * 2 if name in _PACKED else ("PIL", "pillow")
    if (name in _PACKED or name in _image_names()) and find_spec(module) is None:
        raise ConfigError(f"field {ext!r}: {kind} needs {package}, which is missing", hint=f"pip install {package}")


def reader(kind: str) -> Read:
    """Return the function that decodes one value.

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
        return lambda value: _tensor(handler("jpg", _image(value)))
    if name in _NUMBERS:
        return lambda value: torch.tensor(one_cls(value), dtype=torch.int64)
    decode = autodecode.decoders[name]
    if name == "npz":
        return lambda value: decode(_bounded_zip(value))
    return lambda value: _tensor(decode(bytes(value)))


def _image_names() -> set[str]:
    from webdataset import autodecode

    return set(autodecode.imagespecs)


def _torch(value: memoryview) -> Any:
    data = _bounded_zip(value) if bytes(value[:2]) == b"PK" else bytes(value)  # the old torch format is not a zip file
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(found, Tensor):
        return found
    if found.layout == torch.strided and found.numel() * found.itemsize > max(MAX_EXPANDED, len(data)):
        raise ValueError(f"a tensor of shape {tuple(found.shape)}, many times the size of its file")
    return found.detach()


def _tensor(found: Any) -> Any:
    """Convert a numeric array to a tensor, so that a batch of them can be stacked; return anything else unchanged."""
    if isinstance(found, np.ndarray) and found.dtype.kind in "biufc":
        return torch.from_numpy(np.array(found, order="C"))
    return found


def _image(value: memoryview) -> bytes:
    """Return the bytes of an image, rejecting PostScript, which Pillow would run in Ghostscript whatever its name."""
    from PIL import Image

    data = bytes(value)
    if data.startswith(_POSTSCRIPT):
        raise ValueError("a PostScript program, which is not run")
    with Image.open(io.BytesIO(data)) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
    return data


def _bounded_zip(value: memoryview) -> bytes:
    """Return the bytes of a zip file that expands to 1 GiB at most; readers stop at the listed member sizes."""
    data = bytes(value)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > MAX_EXPANDED:
        raise ValueError(f"{size:,} bytes when decompressed, more than {MAX_EXPANDED:,}")
    return data
