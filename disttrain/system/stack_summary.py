"""Describe what a process is doing, from the Python stacks of its threads.

Distinguishes the reader (and its shard), a collective, the backward pass and user code by the files that the frames
belong to, and disttrain's own waits by the marks that they set (:class:`waiting_for`). It calls nothing that could
block, so it works from a thread next to hanging training. Cost: a microsecond per mark.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

_PACKAGE: Final = str(Path(__file__).parents[1]) + "/"
_LIBRARIES: Final = tuple({f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_LOADER: Final = "data/loader/loaders.py"
_MOST_SHARDS: Final = 3

_READERS: Final = "disttrain-reader"  # threads that read ahead
_SAVERS: Final = "disttrain-save"  # threads that write and copy checkpoints
_WAITS: Final[dict[int, list[waiting_for]]] = {}  # by thread, the innermost last


class waiting_for:  # noqa: N801 - it reads as a sentence
    """Mark a wait inside C code, which has no Python frame of its own.

    Example:
        >>> with waiting_for("the vote on stopping"):
        ...     work.wait()

    Args:
        what: the collective in which this process waits for the other ranks.
        own: the wait is for one of this process's own threads, which writes or copies a checkpoint.
    """

    def __init__(self, what: str, *, own: bool = False) -> None:
        self.phrase, self.own = f"waits for {what}" if own else f"waits for the other ranks in {what}", own

    def __enter__(self) -> None:
        _WAITS.setdefault(threading.get_ident(), []).append(self)

    def __exit__(self, *unused: object) -> None:
        thread = threading.get_ident()
        _WAITS[thread].pop()
        if not _WAITS[thread]:
            del _WAITS[thread]


class Place(NamedTuple):
    """What a thread is doing."""

    stack: Sequence[FrameType]
    """The thread's frames, innermost first."""
    wait: waiting_for | None = None
    """The innermost wait that the thread has marked."""


def place_of(thread: threading.Thread) -> Place:
    """Return the place of a thread; a thread that has ended has no frames."""
    frames = list(_outwards(sys._current_frames().get(thread.ident or 0)))
    return Place(frames, next(reversed(_WAITS.get(thread.ident or 0, ())), None))


def whereabouts() -> tuple[str, str]:
    """Describe the main thread, with a phrase such as ``is in user code train.py:12 (forward)``, and all stacks."""
    places = {thread.name: place_of(thread) for thread in threading.enumerate()}
    own = threading.current_thread().name
    parts = []
    for name, place in places.items():
        if name != own and place.stack:
            parts.append(f"thread {name}\n" + "".join(traceback.format_stack(place.stack[0])))
    readers = [place.stack for name, place in places.items() if name.startswith(_READERS)]
    savers = [place for name, place in places.items() if name.startswith(_SAVERS)]
    return describe(places[threading.main_thread().name], readers, savers), "\n".join(parts)


def describe(place: Place, readers: Sequence[Sequence[FrameType]], savers: Sequence[Place] = ()) -> str:
    """Describe a main thread in one phrase.

    Args:
        place: what it is doing.
        readers: frames of the reader threads.
        savers: what the threads that write and copy checkpoints are doing.
    """
    main, wait = place
    if wait is not None:
        # Of several savers, the latest one counts: a copy, if there is one.
        return f"{wait.phrase}, which {describe(savers[-1], [])}" if wait.own and savers else wait.phrase
    if any(_loads(frame) for frame in main):  # reading in the main thread, without reader threads
        return _in_reader([main])
    for position, frame in enumerate(main):
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.startswith(_PACKAGE):
            part = path.removeprefix(_PACKAGE)
            if part == _LOADER:
                return _in_reader(readers)
        elif "/torch/distributed/" in path and "/torch/distributed/checkpoint/" not in path:  # the latter writes files
            inside = next((i for i in range(position, len(main)) if not _is_torch(main[i])), len(main))
            called = [f.f_code.co_name for f in main[position:inside] if "/torch/distributed/" in f.f_code.co_filename]
            what = next((each for each in reversed(called) if each != "wrapper"), name)
            return f"waits for the other ranks in {what}{_caller(main[inside:])}"
        elif path.endswith("/torch/autograd/graph.py") and name == "_engine_run_backward":
            return "is in the backward pass, where gradients are reduced"
        elif _is_users(frame):
            return f"is in user code {_spot(frame)}"
    return f"is in {_spot(main[0])}" if main else "has no Python frame"


def _in_reader(readers: Sequence[Sequence[FrameType]]) -> str:
    for stack in readers:
        depth = next((depth for depth, frame in enumerate(stack) if _loads(frame)), None)
        if depth is not None:
            users = next((frame for frame in stack[:depth] if _is_users(frame)), None)
            told = [_shards(stack[:depth]), f"in user code {_spot(users)}" if users is not None else ""]
            return ", ".join(["is in the reader", *filter(None, told)])
    return "waits for the reader, whose threads are idle"


def _loads(frame: FrameType) -> bool:
    return frame.f_code.co_filename == _PACKAGE + _LOADER and frame.f_code.co_name == "_load"


def _shards(stack: Sequence[FrameType]) -> str:
    """Name the shard that a reader thread is reading; if it is in no file, name the shards of its micro batch."""
    for frame in stack:
        path = frame.f_locals.get("path") if frame.f_code.co_filename.startswith(_PACKAGE + "data/") else None
        if isinstance(path, (str, Path)):
            return f"shard {Path(path).name}"
    for frame in stack:
        maker: Any = frame.f_locals.get("self")
        ids = frame.f_locals.get("ids")
        if frame.f_code.co_name == "make" and ids is not None and hasattr(maker, "reader"):
            return _shards_of(maker.reader.index, ids)
    return ""


def _shards_of(index: Any, ids: Any) -> str:
    numbers = sorted({int(number) - 1 for number in index.starts.searchsorted(ids.ravel(), side="right")})
    names = [Path(str(index.shards[number].path)).name for number in numbers]
    more = f" and {len(names) - _MOST_SHARDS} more" if len(names) > _MOST_SHARDS else ""
    return f"shard{'s' if len(names) > 1 else ''} {', '.join(names[:_MOST_SHARDS])}{more}"


def _caller(stack: Sequence[FrameType]) -> str:
    """Name the caller of a collective, unless it is Lightning."""
    for frame in stack:
        if _is_users(frame):
            return f", called by user code {_spot(frame)}"
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return f", called by disttrain/{frame.f_code.co_filename.removeprefix(_PACKAGE)} ({frame.f_code.co_name})"
    return ""


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_torch(frame: FrameType) -> bool:
    return "/torch/" in frame.f_code.co_filename and not _is_users(frame)


def _is_users(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return not (path.startswith((_PACKAGE, "<", *_LIBRARIES)) or "/bin/" in path)


def _spot(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"
