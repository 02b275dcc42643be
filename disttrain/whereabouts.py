"""Describe what a process is doing, from the Python stacks of its threads.

Distinguishes the reader (and its shard), a collective, the backward pass and user code by the files that the frames
belong to. It only inspects frames and calls nothing that could block, so it works from a thread next to hanging
training. Cost: none until called.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

_PACKAGE: Final = str(Path(__file__).parent) + "/"
_LIBRARIES: Final = tuple({f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_LOADER: Final = "data/loader.py"
_MOST_SHARDS: Final = 3

# Where disttrain itself waits for other ranks: a wait inside C code has no Python frame of its own.
_WAITS: Final = {
    ("parallel/votes.py", "result"): "the vote on stopping",
    ("parallel/votes.py", "begin"): "the vote on stopping",
    ("tasks/base.py", "on_before_optimizer_step"): "the gathering of the step's loss",
    ("tasks/base.py", "_gather_sums"): "the gathering of the step's loss",
    ("parallel/agree.py", "raise_together"): "an agreement on whether a part failed",
}
# Where it waits for its own thread that writes or copies a checkpoint.
_SAVES: Final = (
    ("checkpoint/saver.py", "wait"),
    ("checkpoint/saver.py", "poll"),
    ("checkpoint/saver.py", "_finish_done"),
)
_SAVES_ANY: Final = "waits for a save or a copy"


def whereabouts() -> tuple[str, str]:
    """Describe the main thread, with a phrase such as ``is in user code train.py:12 (forward)``, and all stacks."""
    frames = sys._current_frames()
    stacks = {
        thread.name: list(_outwards(frames[thread.ident])) for thread in threading.enumerate() if thread.ident in frames
    }
    main = stacks.get(threading.main_thread().name, [])
    own = threading.current_thread().name
    parts = []
    for name, stack in stacks.items():
        if name != own and stack:
            parts.append(f"thread {name}\n" + "".join(traceback.format_stack(stack[0])))
    readers, savers = (
        [stack for name, stack in stacks.items() if name.startswith(f"disttrain-{kind}")] for kind in ("reader", "save")
    )
    return describe(main, readers, savers), "\n".join(parts)


def describe(
    main: Sequence[FrameType], readers: Sequence[Sequence[FrameType]], savers: Sequence[Sequence[FrameType]] = ()
) -> str:
    """Describe a main thread in one phrase.

    Args:
        main: its frames, innermost first.
        readers: frames of the reader threads.
        savers: frames of the threads that write and copy checkpoints.
    """
    if any(_loads(frame) for frame in main):  # reading in the main thread, without reader threads
        return _in_reader([main])
    for position, frame in enumerate(main):
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.startswith(_PACKAGE):
            part = path.removeprefix(_PACKAGE)
            if part == _LOADER:
                return _in_reader(readers)
            if (part, name) in _SAVES:
                # The latest one: a copy, if there is one.
                return f"waits for a save or a copy, which {describe(savers[-1], [])}" if savers else _SAVES_ANY
            if (part, name) in _WAITS:
                return f"waits for the other ranks in {_WAITS[part, name]}"
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
    return "waits for the reader, whose threads have nothing to do"


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
