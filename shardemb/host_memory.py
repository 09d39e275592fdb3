"""How much memory this node has for the processes of this job. Reads, allocates nothing."""

import os
from pathlib import Path

from shardemb.control_groups import control_groups

_LIMIT_FILE = {1: "memory.limit_in_bytes", 2: "memory.max"}  # by the version of control groups
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
    for folder, version in control_groups("memory", root):
        path = folder / _LIMIT_FILE[version]
        text = path.read_text().strip() if path.is_file() else "max"
        if text.isdigit() and int(text) < _UNLIMITED:
            limits.append(int(text))
    return min(limits)
