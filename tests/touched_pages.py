"""Counts the pages of tensors that a step reads or writes, by what Linux notes of each page.

`/proc/self/clear_refs` makes the kernel forget which pages were accessed, and `Referenced` of a
mapping in `/proc/self/smaps` is what was accessed since (proc_pid_clear_refs(5), proc_pid_smaps(5)
of the Linux manual). So it sees what any code does, and pages of 4 KB, not bytes.
"""

import ctypes
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_DONT_DUMP, _DO_DUMP = 16, 17  # of madvise: of no account but that mappings which differ are apart
_THP_DISABLE = 41  # of prctl: a huge page would be referenced as a whole


def refuse_huge_pages() -> None:
    """Tensors that this process makes from now on have small pages only."""
    _libc.prctl(_THP_DISABLE, 1, 0, 0, 0)


def why_not() -> str | None:
    """Why pages cannot be counted here, if so: some of a small block are touched and counted."""
    block = torch.ones(18 * _PAGE, dtype=torch.uint8)
    touched = torch.tensor([3, 7, 8]) * _PAGE
    try:
        found = referenced_pages({"block": block}, lambda: block.index_select(0, touched))
    except OSError as error:
        return f"pages cannot be counted here: {error}"
    if found != {"block": 3}:
        return f"the kernel counts {found['block']} pages where 3 were touched"
    return None


def referenced_pages(
    tensors: Mapping[str, torch.Tensor], step: Callable[[], object]
) -> dict[str, int]:
    """How many pages of each tensor a step reads or writes, of those that are all its own.

    Args:
        tensors: On CPU.
        step: What to watch.

    Returns:
        The numbers by the names of the tensors.

    Raises:
        OSError: The kernel does not count.
    """
    blocks = [whole_pages(tensor) for tensor in tensors.values()]
    with _apart(blocks):
        Path("/proc/self/clear_refs").write_text("1")
        _forget_translations(blocks)
        step()
        maps = Path("/proc/self/smaps").read_text()
    return {name: _referenced(maps, whole_pages(tensor)) for name, tensor in tensors.items()}


def whole_pages(tensor: torch.Tensor) -> range:
    """The numbers of the pages that lie in a tensor from end to end."""
    return range(-(-tensor.data_ptr() // _PAGE), (tensor.data_ptr() + tensor.nbytes) // _PAGE)


def pages_of_rows(tensor: torch.Tensor, rows_U: torch.Tensor) -> int:
    """On how many of these pages some rows lie."""
    row = tensor.nbytes // len(tensor)
    first_U = tensor.data_ptr() + rows_U * row
    pages = torch.cat([first_U // _PAGE, (first_U + row - 1) // _PAGE]).unique().tolist()
    own = whole_pages(tensor)
    return sum(page in own for page in pages)


@contextmanager
def _apart(blocks: list[range]) -> Iterator[None]:
    """Makes the kernel list each block of pages as a mapping of its own.

    Raises:
        OSError: It does not.
    """
    for pages in blocks:
        _call(_libc.madvise, pages, _DONT_DUMP)
    yield
    for pages in blocks:
        _call(_libc.madvise, pages, _DO_DUMP)


def _forget_translations(blocks: list[range]) -> None:
    """Takes pages out of the processor's TLB, with which it would not note an access again.

    Raises:
        OSError: It does not.
    """
    for pages in blocks:
        _call(_libc.mprotect, pages, mmap.PROT_READ)
        _call(_libc.mprotect, pages, mmap.PROT_READ | mmap.PROT_WRITE)


def _call(function: Callable[..., int], pages: range, argument: int) -> None:
    """Calls a function of the C library that takes an address, a size and a number.

    Raises:
        OSError: It fails.
    """
    address, size = ctypes.c_void_p(pages.start * _PAGE), ctypes.c_size_t(len(pages) * _PAGE)
    if function(address, size, argument):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _referenced(maps: str, pages: range) -> int:
    """How many pages of a block were referenced: of one mapping, or of some with other flags.

    Memory that was a table's before may have been advised for huge pages, which splits it.

    Raises:
        OSError: No mappings make up the block, or one has huge pages.
    """
    start, stop = pages.start * _PAGE, pages.stop * _PAGE
    mapped = referenced = 0
    for found in re.finditer(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags", maps, re.DOTALL | re.MULTILINE
    ):
        begin, end = int(found[1], 16), int(found[2], 16)
        if start <= begin and end <= stop:
            sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", found[0], re.MULTILINE))
            if int(sizes.get("AnonHugePages", 0)):
                raise OSError("tensors have huge pages")
            mapped += end - begin
            referenced += int(sizes["Referenced"]) * 1024
    if mapped != stop - start:
        raise OSError(f"no mappings make up {start:08x}-{stop:08x} in /proc/self/smaps")
    return referenced // _PAGE
