# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: addresses that a careless or hostile program hands to the kernel, and calls that take them as they are.

Promises that nothing which the kernel writes to such an address can hit the program itself: what is mapped lies between
pages that nobody may touch, and all other addresses are no program's.
"""

from __future__ import annotations

import ctypes
import mmap
import random

PAGE = mmap.PAGESIZE
#: Bytes that may be used at an address of a kind in USABLE.
ROOM = 4 * PAGE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.memfd_create.argtypes = [ctypes.c_char_p, ctypes.c_uint]
_libc.syscall.restype = ctypes.c_long
_FIXED = 0x10

USABLE = ("start", "end", "odd")
READ_ONLY = "read-only"
#: "straddling": the first bytes may be used, the rest not.
UNUSABLE = ("null", "low", "untouchable", "straddling", "top", "gap", "kernel", "minus one")
KINDS = (*USABLE, READ_ONLY, *UNUSABLE)


def call(function: str, *arguments: int) -> tuple[int, int]:
    """A function of the C library with integers and addresses as they are: (its result, errno or 0)."""
    ctypes.set_errno(0)
    result = getattr(_libc, function)(*(ctypes.c_long(_signed(argument)) for argument in arguments))
    return result, ctypes.get_errno() if result == -1 else 0


# The others return an int, which is the default.
for _name in ("read", "write", "pread64", "pwrite64", "readv", "lseek", "splice", "sendfile"):
    getattr(_libc, _name).restype = ctypes.c_long


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _map(address: int | None, length: int, protection: int, flags: int, fd: int) -> int:
    got: int = _libc.mmap(address, length, protection, flags, fd, 0)
    if got in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    return got


class Arena:
    """ROOM bytes between untouchable pages, and the same bytes read-only elsewhere."""

    def __init__(self) -> None:
        fd = _libc.memfd_create(b"arena", 0)
        if fd < 0 or _libc.ftruncate(fd, ctypes.c_long(ROOM)):
            raise OSError(ctypes.get_errno(), "memfd")
        both = mmap.PROT_READ | mmap.PROT_WRITE
        self.untouchable = _map(None, ROOM + 2 * PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.start = _map(self.untouchable + PAGE, ROOM, both, mmap.MAP_SHARED | _FIXED, fd)
        frozen = _map(None, ROOM + 2 * PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.frozen = _map(frozen + PAGE, ROOM, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, fd)
        _libc.close(fd)

    def place(self, pick: random.Random, kind: str, payload: bytes) -> int:
        """Put the payload where an address of this kind points to, as far as anything is there; the address."""
        size = len(payload)
        if kind == "straddling":
            inside = pick.randrange(1, size) if size > 1 else 0
            address = self.start + ROOM - inside
            ctypes.memmove(address, payload, inside)
            return address
        if kind in UNUSABLE:
            return {
                "null": 0,
                "low": pick.randrange(1, 65536),
                "untouchable": self.untouchable + pick.randrange(PAGE - 1024),
                "top": (1 << 47) - PAGE + pick.randrange(PAGE),
                "gap": (1 << 47) + pick.randrange(1 << 60),
                "kernel": 0xFFFF_8880_0000_0000 + pick.randrange(1 << 30),
                "minus one": (1 << 64) - 1 - pick.randrange(8),
            }[kind]
        offset = {"end": ROOM - size, "odd": 1 + pick.randrange(7)}.get(kind, 0)
        ctypes.memmove(self.start + offset, payload, size)
        return (self.frozen if kind == READ_ONLY else self.start) + offset

    def room(self, address: int) -> int:
        """Bytes from an address up to the untouchable page behind."""
        return self.start + ROOM - address

    def at(self, address: int, size: int) -> bytes:
        """What is at a usable address now."""
        return ctypes.string_at(address, size)
