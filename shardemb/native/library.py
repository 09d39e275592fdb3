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
    found = next(one for level in (best, 3, 1) if level <= best and (one := _load(level)))
    found.se_look_up.restype = ctypes.c_int64
    found.se_sorted_new.restype = ctypes.c_void_p
    found.se_largest.restype = ctypes.c_float
    return found


@functools.cache
def missing() -> str | None:
    """Why there is no compiled code, in words; None where there is."""
    lowest = _load(1)
    if lowest is None:
        return (
            "shardemb was installed without its compiled kernels; have a C compiler such as gcc "
            f"when you {_BUILD_AGAIN}"
        )
    sources = sorted([*_FOLDER.glob("*.c"), *_FOLDER.glob("*.h")])
    built_from = ctypes.c_uint32(lowest.se_sources()).value
    if sources and built_from != zlib.crc32(b"".join(path.read_bytes() for path in sources)):
        return (
            f"shardemb's compiled kernels are of other sources than its folder has; {_BUILD_AGAIN}"
        )
    return None


def _load(level: int) -> ctypes.CDLL | None:
    """The library of an x86-64 level; 1 is that of any machine."""
    _share_openmp()
    for path in sorted(_FOLDER.glob(f"_level{level}.*so")):
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # of another machine or C library
            continue
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
