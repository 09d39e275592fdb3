"""Memory: how much, whether freed memory is kept, huge pages, and what ranks share."""

import json
import re
import shutil
from pathlib import Path

from shardemb.doctor.finding import Finding
from shardemb.doctor.probes import Probe
from shardemb.text import format_bytes

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ALLOCATOR_SETTINGS = (
    "MALLOC_MMAP_MAX_ MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ GLIBC_TUNABLES LD_PRELOAD"
)


def check_memory() -> list[Finding]:
    """Memory, and how much of it processes can share."""
    info, shared = Path("/proc/meminfo"), Path("/dev/shm")
    if not info.exists() or not shared.is_dir():
        return []
    num_kib = {key: int(n) for key, n in re.findall(r"(\w+):\s+(\d+)", info.read_text())}
    free, total = (format_bytes(num_kib[key] * 1024) for key in ("MemAvailable", "MemTotal"))
    text = f"{free} free of {total}"
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (allowed := limit.read_text().strip()) != "max":
        text += f", of which this container may use {format_bytes(int(allowed))}"
    memory = Finding("memory", "ok", text)
    num_bytes = shutil.disk_usage(shared).total
    text = f"{format_bytes(num_bytes)} in {shared}"
    if num_bytes >= 1 << 30:
        return [memory, Finding("shared memory", "ok", text)]
    text += ": ranks and loader workers exchange batches there"
    return [memory, Finding("shared memory", "note", text, "docker run --shm-size=8g ...")]


def check_allocator(tried: Probe) -> Finding:
    """Whether freed memory stays with the process, which makes large steps 2-3 times as fast."""
    if tried.error:
        return Finding("malloc", "note", tried.error, f"unset {_ALLOCATOR_SETTINGS}")
    name, keeps, left_alone = json.loads(tried.answer)
    because = f", as {left_alone}" if left_alone and "is not" not in left_alone else ""
    if keeps:
        return Finding("malloc", "ok", f"{name}, keeps freed memory{because}")
    text = f"{name}, gives freed memory back{because}: large steps are slower"
    return Finding("malloc", "note", text, f"unset {_ALLOCATOR_SETTINGS}")


def check_huge_pages(modes: str, tried: Probe) -> Finding:
    """Transparent huge pages.

    Args:
        modes: The kernel's list, such as `always [madvise] never`.
        tried: How many bytes lay on huge pages, of some that were asked for.

    Returns:
        Whether tables get them.
    """
    chosen = re.search(r"\[(\w+)\]", modes)
    if chosen is None:
        return Finding("huge pages", "ok", "no setting for them on this system")
    if chosen[1] == "never":
        text = "never: lookups in large tables are slower"
        return Finding("huge pages", "note", text, f"echo madvise | sudo tee {HUGE_PAGES}")
    if int(tried.answer or 0):
        return Finding("huge pages", "ok", f"{chosen[1]}, tables lie on them")
    text = (
        f"{chosen[1]}, but there was none to be had: {tried.error or 'memory is in small pieces'}"
    )
    remedy = "echo 1 | sudo tee /proc/sys/vm/compact_memory"
    return Finding("huge pages", "note", text, remedy)


def check_exchange(tried: Probe, *, compiled: bool) -> Finding:
    """Whether ranks of one node can exchange rows through memory that they share.

    Args:
        tried: Whether two processes could.
        compiled: Whether there is the compiled code that does so.
    """
    if not compiled:
        text = "ranks of one node go through gloo, without the compiled code"
        return Finding("exchange", "note", text, "see kernels above")
    if not tried.error:
        return Finding("exchange", "ok", "ranks of one node can share memory")
    text = f"ranks of one node go through gloo, they cannot share memory: {tried.error}"
    if "/proc/" in tried.error:
        remedy = "sudo mount -o remount,hidepid=0 /proc  # and start all ranks as one user"
    else:
        remedy = "docker run --security-opt seccomp=unconfined ...  # memfd_create is refused"
    return Finding("exchange", "note", text, remedy)
