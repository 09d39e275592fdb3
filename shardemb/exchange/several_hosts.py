"""The same exchanges where ranks are on several hosts, or where a group has one rank only."""

import ctypes
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch

from shardemb.errors import RunError
from shardemb.exchange.calls import Parts, name_of
from shardemb.exchange.neighbours import Member
from shardemb.exchange.shared import SharedMemory


class Alone:
    """Collectives of one rank: it gives itself what it has."""

    def run(
        self,
        call: int,  # noqa: ARG002 - as of SharedMemory
        item_bytes: int,  # noqa: ARG002
        parts: Parts,
        *,
        shared: bool = False,  # noqa: ARG002
        total: tuple[int, int, int] = (-1, 0, 0),
    ) -> None:
        """Copies the part for this rank.

        Raises:
            ValueError: The output has another size.
        """
        (start,), (num_bytes,), (to,), (room,) = parts
        if num_bytes != room:
            raise ValueError(f"a rank that is alone gives itself {num_bytes} bytes, not {room}")
        to = to if total[0] < 0 else total[2]
        if num_bytes and start != to:
            ctypes.memmove(to, start, num_bytes)

    def leave(self) -> None:
        """Nobody waits."""


class SeveralHosts:
    """Exchanges between all ranks: with neighbours in their memory, with others through gloo.

    Args:
        library: The compiled code, if there is any.
        member: This rank.
        near: The ranks on this host, this one among them.
        memory: That of neighbours, if there are any.
    """

    def __init__(
        self,
        library: ctypes.CDLL | None,
        member: Member,
        near: Sequence[int],
        memory: SharedMemory | None,
    ) -> None:
        self._library, self._member, self._near = library, member, near
        self.memory = memory
        self._is_near = [rank in near for rank in range(member.size)]

    def run(
        self,
        call: int,
        item_bytes: int,
        parts: Parts,
        *,
        shared: bool = False,  # noqa: ARG002 - as of SharedMemory
        total: tuple[int, int, int] = (-1, 0, 0),
    ) -> None:
        """Sends each rank its part, and takes or sums what they send.

        Args:
            call: Of calls.py.
            item_bytes: Bytes of a number.
            parts: By rank of the group.
            shared: Whether all get the same part.
            total: The dtype, operation and place of the sum of all parts, where they are summed.
        """
        starts, sent, to, awaited = parts
        dtype, operation, place = total
        if dtype >= 0:
            room = torch.empty(sum(awaited), dtype=torch.uint8)
            to = [room.data_ptr() + before for before in accumulate(awaited[:-1], initial=0)]
        self._move(call, item_bytes, (starts, sent, to, awaited))
        if dtype >= 0:
            assert self._library is not None
            count = ctypes.c_int64(awaited[0] // item_bytes)
            pointers = (ctypes.c_void_p * len(to))(*to)
            self._library.se_exchange_reduce(
                dtype, operation, ctypes.c_void_p(place), pointers, len(to), count
            )

    def leave(self) -> None:
        """Tells the neighbours that this rank takes part in nothing more."""
        if self.memory is not None:
            self.memory.leave()

    def _move(self, call: int, item_bytes: int, parts: Parts) -> None:
        """Sends each rank its part, and takes what they send.

        Raises:
            RunError: A rank does not come, or calls something else.
        """
        starts, sent, to, awaited = parts
        far_sent = [0 if near else num for near, num in zip(self._is_near, sent, strict=True)]
        far_awaited = [0 if near else num for near, num in zip(self._is_near, awaited, strict=True)]
        send = torch.empty(sum(far_sent), dtype=torch.uint8)
        _copy(starts, accumulate(far_sent[:-1], initial=send.data_ptr()), far_sent)
        receive = torch.empty(sum(far_awaited), dtype=torch.uint8)
        work = self._member.gloo.alltoall_base(receive, send, far_awaited, far_sent)
        if self.memory is not None:
            near = tuple([values[rank] for rank in self._near] for values in parts)
            self.memory.run(call, item_bytes, near)  # type: ignore[arg-type]
        else:
            me = self._member.rank
            Alone().run(call, item_bytes, tuple([values[me]] for values in parts))  # type: ignore[arg-type]
        try:
            work.wait()
        except RuntimeError as error:
            raise RunError(
                f"{name_of(call)} with ranks on other hosts failed, see what they printed: {error}"
            ) from error
        _copy(accumulate(far_awaited[:-1], initial=receive.data_ptr()), to, far_awaited)


def _copy(starts: Iterable[int], to: Iterable[int], nums: Sequence[int]) -> None:
    for start, place, num_bytes in zip(starts, to, nums, strict=True):
        if num_bytes:
            ctypes.memmove(place, start, num_bytes)
