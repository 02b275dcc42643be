"""Turn SIGBUS from a truncated or failing mapped file into a read error instead of a crash.

Touching a page that a mapped file no longer has raises SIGBUS, which kills the process. For files mapped by
disttrain, a handler replaces the rest of the mapping with zeros, so that the faulting copy completes, and marks the
mapping as torn. After a read, the reader checks the marks of all mappings it used, whichever thread faulted. Any other
SIGBUS goes to the previous handler. The handler runs Python code, which is safe here because the fault comes from a
plain copy that holds no lock of the interpreter or the allocator. Needs 64-bit Linux; elsewhere nothing may be mapped.
Cost: none until a fault.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import weakref
from threading import Lock
from typing import Final

_SIGINFO: Final = 4  # SA_SIGINFO: pass siginfo_t, which has the faulting address, to the handler
_FIXED_ANONYMOUS: Final = 0x10 | 0x20 | mmap.MAP_PRIVATE  # MAP_FIXED | MAP_ANONYMOUS
_ADDRESS_OFFSET: Final = 16  # of si_addr in siginfo_t, with 8-byte pointers

_HANDLER: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """``struct sigaction`` as glibc and musl define it."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Stretch:
    """The memory range of a live mapping.

    Attributes:
        begin: first address.
        end: the address after the last page.
        is_torn: whether a fault was caught in it, so that part of it now reads as zeros.
    """

    __slots__ = ("begin", "end", "is_torn")

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end, self.is_torn = begin, end, False


class _Guard:
    """The signal handler and the memory ranges that it guards."""

    def __init__(self) -> None:
        self._stretches: dict[int, Stretch] = {}  # by first address
        self._lock = Lock()
        self._before = _Action()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (
            *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
            *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
        )
        self._entry = _HANDLER(self._handle)
        action = _Action(handler=ctypes.cast(self._entry, ctypes.c_void_p).value, flags=_SIGINFO)
        self._libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(self._before))

    def watch(self, mapped: mmap.mmap, address: int) -> Stretch:
        stretch = Stretch(address, address + -(-len(mapped) // mmap.PAGESIZE) * mmap.PAGESIZE)
        with self._lock:
            self._stretches[address] = stretch
        weakref.finalize(mapped, self._forget, stretch)
        return stretch

    def _forget(self, stretch: Stretch) -> None:
        if self._stretches.get(stretch.begin) is stretch:  # else a newer mapping has reused the address
            del self._stretches[stretch.begin]

    def _handle(self, number: int, info: int, context: int) -> None:
        address = ctypes.c_void_p.from_address(info + _ADDRESS_OFFSET).value or 0
        for stretch in list(self._stretches.values()):
            if stretch.begin <= address < stretch.end:
                stretch.is_torn = True  # set before the zeros appear: another thread may read them without a fault
                page = address // mmap.PAGESIZE * mmap.PAGESIZE
                self._libc.mmap(page, stretch.end - page, mmap.PROT_READ, _FIXED_ANONYMOUS, -1, 0)
                return
        # Not ours: on return the faulting instruction runs again, and the previous handler gets the signal.
        self._libc.sigaction(number, ctypes.byref(self._before), None)


_guards: list[_Guard] = []
_first: Final = Lock()


def can_guard() -> bool:
    """Return whether SIGBUS from mapped files can be caught on this system."""
    return sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8


def watch(mapped: mmap.mmap, address: int) -> Stretch:
    """Catch faults in a mapping for as long as it lives.

    Args:
        mapped: a file mapped for reading.
        address: its first address.

    Returns:
        Its memory range, whose ``is_torn`` is set when a fault is caught.
    """
    with _first:
        if not _guards:
            _guards.append(_Guard())
    return _guards[0].watch(mapped, address)
