"""Which control groups of Linux this process runs in. Reads files, knows no limits."""

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """The folders whose files limit this process: of its control groups, and of those above them.

    A container that sees its own group as the root of all has none at the path that the kernel
    names; its limit is found at the root.

    Args:
        controller: What is limited, such as "memory" or "cpu".
        root: Where `proc` and `sys` are.

    Yields:
        Each folder, whether it is there or not, with its version of control groups, 1 or 2.
    """
    listed = root / "proc/self/cgroup"
    lines = listed.read_text().splitlines() if listed.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, top = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, top = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield group, version
            if group == top:
                break
