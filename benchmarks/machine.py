"""What a result must state: the machine, the versions, and how fast its memory is."""

import datetime
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

_PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "shardemb")


def describe() -> dict[str, str]:
    """Hardware, versions, date and command of this run."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    } | versions


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?"
    )


def random_row_gb_per_s(embedding_dim: int, num_rows: int, repeats: int = 9) -> float:
    """Bytes read and written a second when random rows of a float32 table are gathered."""
    table_RD = torch.rand(num_rows, embedding_dim)
    ids_N = torch.randint(0, num_rows, (200_000,))
    out_ND = torch.empty(len(ids_N), embedding_dim)
    seconds = median(
        timed(lambda: torch.index_select(table_RD, 0, ids_N, out=out_ND)) for _ in range(repeats)
    )
    return 2 * out_ND.nbytes / seconds / 1e9


def copy_gb_per_s(num_bytes: int = 1 << 28, repeats: int = 9) -> float:
    """Bytes read and written a second when memory is copied in order."""
    source = torch.zeros(num_bytes // 4)
    target = torch.empty_like(source)
    return 2 * num_bytes / median(timed(lambda: target.copy_(source)) for _ in range(repeats)) / 1e9


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
