"""The ranks of a process group that share this host's memory: who they are, and how they map it."""

import ctypes
import hashlib
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardemb.native.library import library

HALF_BYTES = 1 << 21
"""A rank holds two of these for each group, and what is larger goes through them piece by piece."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One rank of a process group.

    Attributes:
        gloo: Torch's `ProcessGroupGloo` of the group; its methods are not in torch's type stubs.
        rank: In the group.
        size: Of the group.
        ranks: The numbers among all ranks, by those in the group.
    """

    gloo: Any
    rank: int
    size: int
    ranks: Sequence[int]

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """The whole numbers of each rank, as many of each. On all ranks together."""
        of_ranks = [torch.empty(len(numbers), dtype=torch.int64) for _ in range(self.size)]
        self.gloo.allgather([of_ranks], [torch.tensor(numbers, dtype=torch.int64)]).wait()
        return [numbers.tolist() for numbers in of_ranks]


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A rank on this host.

    Attributes:
        rank: In the group.
        process: Its number.
        handle: A file that can be read when the process has ended; -1 of this process itself.
        memory: Where its memory is mapped.
    """

    rank: int
    process: int
    handle: int
    memory: int


def host_id() -> str:
    """Names what this process shares with those whose memory it can map."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists() or not hasattr(os, "pidfd_open"):  # another system
        return secrets.token_hex()
    return f"{boot.read_text()} {os.readlink('/proc/self/ns/pid')}"


def compiled() -> ctypes.CDLL | None:
    """The compiled code, where it has an exchange."""
    return library() if sys.platform == "linux" else None


def find_neighbours(
    member: Member, code: ctypes.CDLL | None, host: str
) -> tuple[list[int], list[Neighbour]]:
    """Finds the ranks on this host and maps their memory. On all ranks of the group together.

    Args:
        member: This rank.
        code: The compiled code, if there is any.
        host: Equal on ranks that are on one host.

    Returns:
        A number for each rank of the group, equal where ranks are neighbours; and this rank's
        neighbours, itself among them, or none where it has no other.
    """
    digest = hashlib.sha256(host.encode()).digest()
    mine = [int.from_bytes(digest[start : start + 7], "little") for start in (0, 7)]
    hosts = member.gather([*mine, code is not None])
    if not all(has_code for *_, has_code in hosts):
        return list(range(member.size)), []
    firsts = [hosts.index(host) for host in hosts]
    near = [rank for rank, first in enumerate(firsts) if first == firsts[member.rank]]
    memory = None
    if code is not None and len(near) > 1:
        with suppress(OSError):
            memory = _Memory(code, len(near))
    said = member.gather([0, 0, 0] if memory is None else [os.getpid(), memory.file, memory.token])
    found = None if memory is None else memory.map_all(near, said, member.rank)
    has_all = member.gather([found is not None or len(near) == 1])
    if memory is not None:
        os.close(memory.file)
    # all neighbours map each other, or none of them
    apart = {firsts[rank] for rank, (has,) in enumerate(has_all) if not has}
    numbers = [member.size + rank if first in apart else first for rank, first in enumerate(firsts)]
    if firsts[member.rank] in apart and memory is not None:
        for neighbour in found or []:
            forget(neighbour, code, memory.num_bytes)  # type: ignore[arg-type]
        found = None
    return numbers, found or []


def forget(neighbour: Neighbour, code: ctypes.CDLL, num_bytes: int) -> None:
    """Unmaps a neighbour's memory."""
    code.se_exchange_unmap(ctypes.c_void_p(neighbour.memory), ctypes.c_int64(num_bytes))
    if neighbour.handle >= 0:
        os.close(neighbour.handle)


def bytes_of(code: ctypes.CDLL, size: int) -> int:
    """Bytes that each of `size` neighbours shares."""
    code.se_exchange_bytes.restype = ctypes.c_int64
    num_bytes: int = code.se_exchange_bytes(size, ctypes.c_int64(HALF_BYTES))
    return num_bytes


class _Memory:
    """Memory without a name, which ends with the last process that has mapped it.

    Args:
        code: The compiled code.
        size: Number of ranks that are to share it.
    """

    def __init__(self, code: ctypes.CDLL, size: int) -> None:
        self._code = code
        self.num_bytes = bytes_of(code, size)
        self.file = os.memfd_create("shardemb-exchange")
        os.ftruncate(self.file, self.num_bytes)
        self.token = secrets.randbits(62)
        code.se_exchange_map.restype = ctypes.c_void_p
        os.pwrite(self.file, self.token.to_bytes(8, "little"), 8)

    def map_all(
        self, near: Sequence[int], said: Sequence[Sequence[int]], me: int
    ) -> list[Neighbour] | None:
        """Maps the memory of all ranks on this host; None if one cannot be."""
        found: list[Neighbour] = []
        try:
            for rank in near:
                found.append(self._map(rank, said[rank], is_me=rank == me))  # noqa: PERF401
        except OSError:
            for neighbour in found:
                forget(neighbour, self._code, self.num_bytes)
            return None
        return found

    def _map(self, rank: int, said: Sequence[int], *, is_me: bool) -> Neighbour:
        process, number, token = said
        handle = -1 if is_me else os.pidfd_open(process)
        file = -1
        try:
            file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
            if os.pread(file, 8, 8) != token.to_bytes(8, "little"):
                raise OSError(f"process {process} is not rank {rank}")
            memory = self._code.se_exchange_map(file, ctypes.c_int64(self.num_bytes))
            if not memory:
                raise OSError(f"the memory of rank {rank} cannot be mapped")
        except OSError:
            if handle >= 0:
                os.close(handle)
            raise
        finally:
            if file >= 0:
                os.close(file)
        return Neighbour(rank=rank, process=process, handle=handle, memory=memory)
