"""Finds and loads the compiled code. Holds none of its functions."""

import ctypes
import functools
import zlib
from pathlib import Path

_FOLDER = Path(__file__).parent
_OPENMP = ("libgomp", "libiomp5", "libomp")
_BUILD_AGAIN = "install shardemb again, or: python setup.py build_ext --inplace"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code for this machine; None where there is none, see `missing`."""
    lowest = _load(1)
    if lowest is None or missing() is not None:
        return None
    best: int = lowest.se_level()
    fitting = (_load(level) for level in (4, 3) if level <= best)
    return next((one for one in fitting if one is not None and _is_current(one)), lowest)


@functools.cache
def missing() -> str | None:
    """Why there is no compiled code, in words; None where there is."""
    lowest = _load(1)
    if lowest is None and _paths(1):
        return f"shardemb's compiled kernels do not load on this machine; {_BUILD_AGAIN}"
    if lowest is None:
        return (
            "shardemb was installed without its compiled kernels; have a C compiler such as gcc "
            f"when you {_BUILD_AGAIN}"
        )
    if not _is_current(lowest):
        return (
            f"shardemb's compiled kernels are of other sources than its folder has; {_BUILD_AGAIN}"
        )
    return None


def _is_current(loaded: ctypes.CDLL) -> bool:
    """Whether it was built from the sources beside it, if there are some."""
    sources = sorted([*_FOLDER.glob("*.c"), *_FOLDER.glob("*.h")])
    built_from = ctypes.c_uint32(loaded.se_sources()).value
    return not sources or built_from == zlib.crc32(b"".join(p.read_bytes() for p in sources))


def _paths(level: int) -> list[Path]:
    return sorted(_FOLDER.glob(f"_level{level}.*so"))


def _load(level: int) -> ctypes.CDLL | None:
    """The library of an x86-64 level; 1 is that of any machine."""
    _share_openmp()
    for path in _paths(level):
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # of another machine or C library
            continue
        loaded.se_look_up.restype = ctypes.c_int64
        loaded.se_sorted_new.restype = ctypes.c_void_p
        loaded.se_largest.restype = ctypes.c_float
        return loaded
    return None


@functools.cache
def _share_openmp() -> None:
    """Lets the compiled code find the OpenMP library that torch has loaded, and use its threads."""
    import torch  # noqa: F401 - loads it

    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        return
    paths = {line.split()[-1] for line in mapped.read_text().splitlines() if ".so" in line}
    for path in sorted(paths):
        if Path(path).name.startswith(_OPENMP):
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
