"""Tensors on huge pages of Linux: rows at random places are found with fewer address look-ups.

Where the system has no transparent huge pages, or is set to never use them, they are tensors like
any others. See madvise(2), and the kernel's Documentation/admin-guide/mm/transhuge.rst.
"""

import ctypes
import functools
import mmap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_COLLAPSE = 25  # MADV_COLLAPSE, of Linux 6.1


@functools.cache
def huge_page_bytes() -> int:
    """The size of a transparent huge page; 0 where there are none, or they are set to "never".

    Example:
        >>> huge_page_bytes() % 4096
        0
    """
    enabled, size = _SETTINGS / "enabled", _SETTINGS / "hpage_pmd_size"
    if not (enabled.exists() and size.exists()) or "[never]" in enabled.read_text():
        return 0
    return int(size.read_text())


def zeros_huge(shape: Sequence[int], dtype: "torch.dtype | None" = None) -> "torch.Tensor":
    """Zeros for the CPU, on huge pages of their own if there is more than one of them.

    The kernel makes a page, filled with zeros, when it is first touched; all go back to the system
    when the last tensor on them dies. A process that is forked off has a copy, page by page; what
    this one writes while that one lives falls apart into small pages for good.

    Args:
        shape: Of the tensor.
        dtype: float32 by default.

    Returns:
        Zeros of that shape and dtype.

    Example:
        >>> zeros_huge((100_000, 64))[123].sum()
        tensor(0.)
    """
    import torch

    dtype = dtype or torch.float32
    huge = huge_page_bytes()
    count = torch.Size(shape).numel()
    num_bytes = count * dtype.itemsize
    if huge == 0 or num_bytes < 2 * huge:
        return torch.zeros(shape, dtype=dtype)
    memory = huge_mapping(num_bytes + huge)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % huge
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)


def huge_mapping(num_bytes: int) -> mmap.mmap:
    """Memory of this process alone for which the system is asked for huge pages."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def advise_huge(*tensors: "torch.Tensor") -> None:
    """Asks the system for huge pages under tensors that others made; their values stay.

    Pages that are there are put together now, which copies them once; others come as huge ones.

    Args:
        tensors: Tables and the like, the whole memory on which they lie; what is small or not on
            the CPU stays as it is.

    Example:
        >>> import torch
        >>> advise_huge(torch.ones(100_000, 64))
    """
    huge = huge_page_bytes()
    if huge == 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    storages = [tensor.untyped_storage() for tensor in tensors if _is_plain(tensor)]
    blocks = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for address, num_bytes in blocks.items():
        begin = address + -address % mmap.PAGESIZE
        end = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end - begin < 2 * huge:
            continue
        # advice: what the system cannot do, it does not, and says so, and nothing is lost
        if libc.madvise(begin, end - begin, mmap.MADV_HUGEPAGE) == 0:
            libc.madvise(begin, end - begin, _COLLAPSE)


def _is_plain(tensor: "torch.Tensor") -> bool:
    return tensor.device.type == "cpu" and not tensor.is_pinned()
