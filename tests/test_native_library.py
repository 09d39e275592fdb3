"""Which compiled code is loaded, and what is said where there is none."""

import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from shardemb.native import library as compiled
from tests.native_cases import levels, needs_kernels

PACKAGE = Path(__file__).parents[1] / "shardemb"
ASK = """
from shardemb.native import library as compiled
found = compiled.library()
print(compiled.__file__)
print(found and found._name)
print(compiled.missing())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the compiled code in a copy of the package, without any."""
    shutil.copytree(
        PACKAGE, tmp_path / "shardemb", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path / "shardemb/native"


def copy_level(level: int, folder: Path) -> None:
    for path in compiled._paths(level):
        shutil.copy(path, folder)


def ask(folder: Path) -> tuple[str, str]:
    """The library that a process with that copy finds, and why there is none."""
    code = f"import sys; sys.path.insert(0, {str(folder.parents[1])!r}){ASK}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
    )
    module, found, missing = done.stdout.strip().splitlines()
    assert Path(module).parent == folder
    return found, missing


def test_without_compiled_code_it_is_said_how_to_build_it(folder: Path) -> None:
    found, missing = ask(folder)
    assert found == "None"
    assert "installed without its compiled kernels; have a C compiler" in missing
    assert "python setup.py build_ext --inplace" in missing


@needs_kernels
def test_code_of_other_sources_is_refused(folder: Path) -> None:
    for level in levels():
        copy_level(level, folder)
    assert ask(folder)[1] == "None"
    source = folder / "lookup.c"
    source.write_text(source.read_text() + "\n/* changed */\n")
    found, missing = ask(folder)
    assert found == "None"
    assert "kernels are of other sources than its folder has; install shardemb again" in missing
    for path in folder.glob("*.[ch]"):
        path.unlink()
    assert ask(folder)[1] == "None"  # an installed package has no sources beside it


@needs_kernels
def test_the_best_level_that_was_built_serves(folder: Path) -> None:
    assert 1 in levels()
    for level in levels():  # from the lowest
        copy_level(level, folder)
        found, missing = ask(folder)
        assert Path(found).name.startswith(f"_level{level}.")
        assert missing == "None"
    serves = compiled.library()
    assert serves is not None
    assert Path(serves._name).name.startswith(f"_level{levels()[-1]}.")


@needs_kernels
def test_a_level_above_the_machines_is_not_taken() -> None:
    lowest = compiled._load(1)
    assert lowest is not None
    assert lowest.se_level() in {1, 3, 4}
    flags = Path("/proc/cpuinfo")
    if flags.exists() and "avx512vl" not in flags.read_text():
        assert lowest.se_level() < 4


@needs_kernels
def test_code_that_does_not_load_is_told_from_none(folder: Path) -> None:
    for path in compiled._paths(1):
        (folder / path.name).write_bytes(b"of another machine")
    found, missing = ask(folder)
    assert found == "None"
    assert "compiled kernels do not load on this machine" in missing


@needs_kernels
def test_a_level_of_other_sources_is_passed_over(folder: Path) -> None:
    """As where a rebuild failed for that level alone."""
    for level in levels():
        copy_level(level, folder)
    best = compiled._paths(levels()[-1])[0]
    built = best.read_bytes()
    stale = built.replace(crc(folder), b"\x01\x02\x03\x04")
    assert stale != built
    (folder / best.name).write_bytes(stale)
    found, missing = ask(folder)
    if len(levels()) > 1:
        assert Path(found).name.startswith(f"_level{levels()[-2]}.")
        assert missing == "None"
    else:
        assert "of other sources" in missing


def crc(folder: Path) -> bytes:
    """The checksum of the sources, as code has it."""
    sources = sorted([*folder.glob("*.c"), *folder.glob("*.h")])
    return zlib.crc32(b"".join(path.read_bytes() for path in sources)).to_bytes(4, "little")
