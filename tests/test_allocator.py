"""What becomes of memory that was freed: counted in page faults and resident bytes."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardemb.allocator import keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")

STEPS = """
import os, re, resource, torch
from pathlib import Path
from shardemb.allocator import give_freed_memory_back, keep_freed_memory
from shardemb.env import init_distributed

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

def faults_of_steps(num_steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(num_steps):
        torch.empty(64 << 18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def run(code: str, **environ: str) -> list[int]:
    """What the code prints, whole numbers, where nothing is set but `environ`."""
    ours = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    unset = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, "-c", STEPS + code],
        env=unset | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@glibc
def test_after_init_distributed_large_blocks_are_used_again_without_page_faults() -> None:
    pages = (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    before, after = run(
        "print(faults_of_steps(10))\n"
        "init_distributed(device='cpu')\n"
        "faults_of_steps(20)\n"
        "print(faults_of_steps(10))"
    )
    assert before >= 10 * pages
    assert after < pages // 10


@glibc
def test_a_user_s_own_settings_are_left_alone() -> None:
    (faults,) = run(
        "init_distributed(device='cpu'); faults_of_steps(20); print(faults_of_steps(10))",
        MALLOC_TRIM_THRESHOLD_=str(1 << 20),
    )
    assert faults >= 10 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert keep_freed_memory({"MALLOC_TRIM_THRESHOLD_": "1"}) == "MALLOC_TRIM_THRESHOLD_ is set"
    tunables = "glibc.malloc.mmap_max=5:glibc.malloc.trim_threshold=7"
    assert keep_freed_memory({"GLIBC_TUNABLES": tunables}) == (
        "glibc.malloc.mmap_max and glibc.malloc.trim_threshold are set"
    )


@glibc
def test_kept_memory_is_resident_until_it_is_given_back() -> None:
    start, kept, given_back = run(
        "assert keep_freed_memory(os.environ) is None\n"
        "print(resident())\n"
        "blocks = [torch.ones(40 << 18) for _ in range(10)]\n"
        "del blocks\n"
        "print(resident())\n"
        "give_freed_memory_back()\n"
        "print(resident())"
    )
    assert kept >= start + 399
    assert given_back < start + 50


@glibc
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_another_allocator_is_left_alone(tmp_path: Path) -> None:
    source, library = tmp_path / "own.c", tmp_path / "own.so"
    source.write_text(
        "#include <stddef.h>\n"
        "void *__libc_malloc(size_t);\n"
        "void *__libc_memalign(size_t, size_t);\n"
        "void *malloc(size_t num_bytes) { return __libc_malloc(num_bytes); }\n"
        "int posix_memalign(void **memory, size_t step, size_t num_bytes)\n"
        "{ return (*memory = __libc_memalign(step, num_bytes)) == 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)

    code = 'print(int(keep_freed_memory({}) == "the allocator is not glibc\'s"))'
    assert run(code) == [0]
    assert run(code, LD_PRELOAD=str(library)) == [1]
