"""Builds the CPU kernels; all else stands in pyproject.toml."""

import copy
import platform
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(Path("shardemb/native").glob("*.c"))
HEADERS = sorted(Path("shardemb/native").glob("*.h"))
# as shardemb/native/library.py reckons it, to notice a library of other sources
DIGEST = zlib.crc32(b"".join(path.read_bytes() for path in sorted([*SOURCES, *HEADERS])))
# -fopenmp only compiles: when they run, the kernels share the OpenMP threads that torch has loaded
FLAGS = [
    "-g0",
    "-O3",
    "-std=gnu11",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wno-psabi",
]
LEVELS = {1: []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {3: ["-march=x86-64-v3"], 4: ["-march=x86-64-v4"]}


class BuildLevels(build_ext):
    """Gives each level a folder of its own for its objects, which have the same names."""

    def build_extension(self, ext: Extension) -> None:
        """Builds one level, perhaps beside the others."""
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp, ext.name))
        build_ext.build_extension(own, ext)


setup(
    cmdclass={"build_ext": BuildLevels},
    options={"build_ext": {"parallel": True}},
    ext_modules=[
        Extension(
            f"shardemb.native._level{level}",
            sources=[str(path) for path in SOURCES],
            depends=[str(path) for path in HEADERS],
            define_macros=[("SE_SOURCES", f"{DIGEST}u")],
            extra_compile_args=[*FLAGS, *flags],
            optional=True,  # without a compiler, or on another machine, FBGEMM's kernels serve
        )
        for level, flags in LEVELS.items()
    ],
)
