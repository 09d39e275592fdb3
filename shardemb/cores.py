"""How many cores this process may use, and how many threads each rank of a node. Starts none."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from shardemb.control_groups import control_groups

_CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""By what a user tells torch how many threads to use."""


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: by affinity, and by the quota of its container.

    Args:
        root: Where `proc` and `sys` are.

    Returns:
        Their number, at least 1.

    Example:
        >>> 1 <= usable_cores() <= os.cpu_count()
        True
    """
    cores = [_processors()]
    for folder, version in control_groups("cpu", root):
        if version == 2:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        else:
            quota = _read(folder / "cpu.cfs_quota_us")
            period = _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # else "max", -1, or no file
            cores.append(int(quota) // int(period))
    return max(1, min(cores))


def threads_per_rank(local_world_size: int, root: Path = Path("/")) -> int:
    """The threads that each rank of a node may run so that no core has two.

    Two hardware threads of a core count as one: what a core computes and reads, one of them can
    ask for.

    Args:
        local_world_size: Number of ranks on the node.
        root: Where `proc` and `sys` are.

    Returns:
        Their number, at least 1.

    Example:
        >>> threads_per_rank(1) >= threads_per_rank(2) >= 1
        True
    """
    return max(1, min(usable_cores(root), _whole_cores(root)) // local_world_size)


def torchs_own_threads(environ: Mapping[str, str], root: Path = Path("/")) -> set[int]:
    """The numbers of threads with which torch starts where nobody tells it how many to use.

    torchrun sets OMP_NUM_THREADS to 1 for several ranks when nobody else did, which is no choice
    either. It is torchrun's if the process that started this one was itself started without.

    Args:
        environ: Of this process.
        root: Where `proc` and `sys` are.

    Returns:
        All of which it may be; none where a user chose.
    """
    chosen = [name for name in _CHOICES if name in environ]
    if not chosen:
        return {_processors(), _whole_cores(root)}
    of_torchrun = environ.get("OMP_NUM_THREADS") == "1" and "TORCHELASTIC_RUN_ID" in environ
    if chosen != ["OMP_NUM_THREADS"] or not of_torchrun:
        return set()
    started_with = root / "proc" / str(os.getppid()) / "environ"
    try:
        variables = started_with.read_bytes().split(b"\0")
    except OSError:  # no Linux, or of another user
        return set()
    return set() if any(each.startswith(b"OMP_NUM_THREADS=") for each in variables) else {1}


def _processors() -> int:
    """Hardware threads that the affinity of this process allows."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _whole_cores(root: Path) -> int:
    """Cores of which the affinity of this process allows a hardware thread."""
    if sys.platform != "linux":
        return _processors()
    folders = (root / f"sys/devices/system/cpu/cpu{cpu}" for cpu in os.sched_getaffinity(0))
    siblings = {_read(folder / "topology/thread_siblings_list") or folder for folder in folders}
    return len(siblings)


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
