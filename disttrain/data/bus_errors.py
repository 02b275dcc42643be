"""A mapped file that is cut off or whose disk fails: an error of the read, not the end of the process.

Touching a page of a mapped file that is not there any more raises SIGBUS, which kills. For the files that
disttrain has mapped it is caught instead: the rest of the mapping is replaced by zeros, so that the copy which
met it comes to its end, and the mapping is marked as torn. Whoever reads looks at the marks of the mappings that it
used afterwards, whichever thread met the fault. A SIGBUS anywhere else goes to whoever handled it before. Python
runs in the handler, which is sound here because such a fault comes from a plain copy, that holds no lock of the
interpreter or of the allocator. Linux with a C library of 64 bits; elsewhere nothing may be mapped. Cost: none until
it happens.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
import weakref
from threading import Lock
from typing import Final

_SIGINFO: Final = 4  # SA_SIGINFO: the handler is told the address
_FIXED_ANONYMOUS: Final = 0x10 | 0x20 | mmap.MAP_PRIVATE  # MAP_FIXED | MAP_ANONYMOUS
_ADDRESS_OFFSET: Final = 16  # of si_addr in siginfo_t, with pointers of 8 bytes

_HANDLER: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """``struct sigaction`` of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Stretch:
    """The memory of a mapping, as long as that lives.

    Attributes:
        begin: its first address.
        end: the address after its last page.
        is_torn: whether a fault was caught in it, so that some of it is zeros by now.
    """

    __slots__ = ("begin", "end", "is_torn")

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end, self.is_torn = begin, end, False


class _Guard:
    """The handler, and the stretches of memory that it is for."""

    def __init__(self) -> None:
        self._stretches: dict[int, Stretch] = {}  # by where they begin
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
        if self._stretches.get(stretch.begin) is stretch:  # else another mapping has been given the address
            del self._stretches[stretch.begin]

    def _handle(self, number: int, info: int, context: int) -> None:
        address = ctypes.c_void_p.from_address(info + _ADDRESS_OFFSET).value or 0
        for stretch in list(self._stretches.values()):
            if stretch.begin <= address < stretch.end:
                stretch.is_torn = True  # before there are zeros, which another thread may meet without a fault
                page = address // mmap.PAGESIZE * mmap.PAGESIZE
                self._libc.mmap(page, stretch.end - page, mmap.PROT_READ, _FIXED_ANONYMOUS, -1, 0)
                return
        self._libc.sigaction(number, ctypes.byref(self._before), None)  # and the fault comes again


_guards: list[_Guard] = []
_first: Final = Lock()


def can_guard() -> bool:
    """Whether faults of mapped files can be caught on this system."""
    return sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8


def watch(mapped: mmap.mmap, address: int) -> Stretch:
    """Catch faults of a mapping, for as long as it lives.

    Args:
        mapped: a file, mapped for reading.
        address: where it begins in memory.

    Returns:
        Its memory, which tells whether a fault was caught there.
    """
    with _first:
        if not _guards:
            _guards.append(_Guard())
    return _guards[0].watch(mapped, address)
