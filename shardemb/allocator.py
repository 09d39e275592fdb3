"""Makes the C library's allocator keep memory that was freed. Allocates none."""

import ctypes
import sys
from collections.abc import Mapping
from pathlib import PurePath
from typing import ClassVar

# mallopt(3), and malloc.h of glibc
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1  # as a size_t it is the largest

_CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_TUNABLES = ("glibc.malloc.mmap_max", "glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold")


def keep_freed_memory(environ: Mapping[str, str]) -> str | None:
    """Makes glibc keep freed memory for the next block, in this whole process and from now on.

    As it comes, glibc gives a freed block of more than 32 MB back to the system, and what is free
    at the end of the heap; a step that makes such outputs pays for the page faults of all their
    pages again. Memory that was freed then stays resident until `give_freed_memory_back`.

    Blocks that other threads than the main one make, if larger than 64 MB, go back as before:
    those threads have heaps of that size, and glibc maps what does not fit.

    Args:
        environ: Of this process: a user's own settings of these options win.

    Returns:
        Why the allocator is left as it is; None where it now keeps memory.

    Example:
        >>> keep_freed_memory({"MALLOC_MMAP_MAX_": "65536"})
        'MALLOC_MMAP_MAX_ is set'
    """
    tunables = environ.get("GLIBC_TUNABLES", "")
    chosen = [name for name in _CHOICES if name in environ]
    chosen += [name for name in _TUNABLES if name in tunables]
    if chosen:
        return f"{' and '.join(chosen)} {'is' if len(chosen) == 1 else 'are'} set"
    library = _glibc()
    if library is None:
        return "the allocator is not glibc's"
    # where blocks are never mapped apart, MMAP_THRESHOLD does not matter; until glibc 2.35 it
    # could not be more than 32 MB
    if not (library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, _NEVER)):
        return "glibc refuses the settings"
    return None


def give_freed_memory_back() -> None:
    """Gives the memory that the allocator keeps, and nothing uses, back to the system."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def allocator_name() -> str:
    """The allocator of this process, such as "glibc 2.36" or "libjemalloc.so.2".

    Example:
        >>> allocator_name() != ""
        True
    """
    library = _glibc()
    if library is not None:
        library.gnu_get_libc_version.restype = ctypes.c_char_p
        return f"glibc {library.gnu_get_libc_version().decode()}"
    if sys.platform != "linux":
        return f"that of {sys.platform}"
    found = _Symbol()
    process = ctypes.CDLL(None)
    process.dladdr(ctypes.cast(process.posix_memalign, ctypes.c_void_p), ctypes.byref(found))
    return PurePath((found.path or b"unknown").decode()).name


class _Symbol(ctypes.Structure):
    """What dladdr(3) fills in."""

    _fields_: ClassVar = [
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and the allocator of this process is its own."""
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    # a library that is preloaded, or linked into Python, comes before glibc; not asked of malloc,
    # whose address in a Python at a fixed place is that of a jump in Python itself
    used = ctypes.cast(ctypes.CDLL(None).posix_memalign, ctypes.c_void_p).value
    own = ctypes.cast(library.posix_memalign, ctypes.c_void_p).value
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library if used == own else None
