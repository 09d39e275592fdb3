"""How much memory this node has for the processes of this job. Reads, allocates nothing."""

import os
from pathlib import Path

_UNLIMITED = 1 << 60
"""What the kernel says where there is no limit is a number above this."""


def host_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory of this node, or of the container or the job that this process runs in.

    Args:
        root: Where `proc` and `sys` are.

    Returns:
        The least of the memory that is built in and the limits of this process's control groups.

    Example:
        >>> host_memory_bytes() > 2**20
        True
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder, file in _groups(root):
        for group in (folder, *folder.parents):
            path = group / file
            text = path.read_text().strip() if path.is_file() else "max"
            if text.isdigit() and int(text) < _UNLIMITED:
                limits.append(int(text))
            if group.parent == root / "sys/fs":
                break
    return min(limits)


def _groups(root: Path) -> list[tuple[Path, str]]:
    """The control groups of this process, version 2 and 1, with the name of the limit's file.

    A container that sees its own group as the root of all has none at the path that the kernel
    names; its limit is found at the root.
    """
    listed = root / "proc/self/cgroup"
    lines = listed.read_text().splitlines() if listed.is_file() else []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            groups.append((root / "sys/fs/cgroup" / path.lstrip("/"), "memory.max"))
        elif "memory" in controllers.split(","):
            folder = root / "sys/fs/cgroup/memory" / path.lstrip("/")
            groups.append((folder, "memory.limit_in_bytes"))
    return groups
