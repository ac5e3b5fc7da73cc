"""Lets the allocator of a process keep what it is given back, on Linux with GNU's C library.

By default it gets every large tensor from the kernel and returns it at once, so that each batch
faults its pages in anew, which the kernel fills with zeros. No torch in here.
"""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
_LARGEST = 2**31 - 1
CHOICES = (
    "GLIBC_TUNABLES",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
)
# by any of these a user decides
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""Of a process whose tensors are made in a thread: in an arena of its own, what is larger than 64
MB comes from the kernel whatever `keep_pages` says. glibc reads it when the process starts; by
`mallopt` it is too late where other threads have arenas, as Ray's do, which new threads then share.
"""


def keep_pages() -> bool:
    """From now on tensors come from memory that was used before; returns whether that is so.

    To be called once long-lived tensors are there: those may lie in memory that nobody has touched
    yet, as keys and values do, and what is reused has to be filled with zeros. The process then
    holds as much as it ever needed at a time, until `give_back`.
    """
    if not _is_ours():
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, _LARGEST))


def give_back() -> None:
    """Return to the kernel what is kept and not in use."""
    if _is_ours():
        ctypes.CDLL(None).malloc_trim(0)


def _is_ours() -> bool:
    return platform.libc_ver()[0] == "glibc" and not any(map(os.environ.get, CHOICES))
