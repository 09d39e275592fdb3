"""Runs collectives of the ranks of one host in their shared memory, and says what goes wrong."""

import ctypes
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta

from shardemb.errors import RunError
from shardemb.exchange.calls import Head, Parts, difference_of, name_of
from shardemb.exchange.neighbours import HALF_BYTES, Neighbour, bytes_of, forget

_DONE, _WAITING, _MISMATCH = range(3)  # of exchange.c
_LEFT, _GAVE_UP = 1, 2  # why a rank left; from 2 on, which one it did not wait for any longer
_SPIN_NS = 50_000
_INTERRUPTED = "an earlier collective was interrupted, and the ranks are out of step; start again"


class SharedMemory:
    """Collectives of neighbours. Each call returns when this rank's part is done.

    Args:
        library: The compiled code.
        neighbours: At least two, this rank among them, in the same order on each.
        ranks: Their numbers among all ranks, for messages.
        me: Which of them this process is.
        num_cores: How many cores this process may use.
        timeout: How long it waits for another.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        neighbours: Sequence[Neighbour],
        *,
        ranks: Sequence[int],
        me: int,
        num_cores: int,
        timeout: Callable[[], timedelta],
    ) -> None:
        self.size, self.me = len(neighbours), me
        self._library, self._neighbours, self._ranks = library, neighbours, ranks
        self._timeout = timeout
        self._broken: str | None = None
        self._lock = threading.Lock()
        memory = (ctypes.c_void_p * self.size)(*(neighbour.memory for neighbour in neighbours))
        library.se_exchange_open.restype = ctypes.c_void_p
        spin_ns = _SPIN_NS if self.size <= num_cores else 0
        exchange = library.se_exchange_open(
            self.size, me, memory, ctypes.c_int64(HALF_BYTES), ctypes.c_int64(spin_ns)
        )
        self._exchange = ctypes.c_void_p(exchange)
        library.se_exchange_arrays.restype = ctypes.c_void_p
        words = library.se_exchange_arrays(self._exchange)
        arrays = [
            (kind * self.size).from_address(words + 8 * self.size * place)
            for place, kind in enumerate([ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2)
        ]
        _, self._from, self._to, self._sent, self._awaited = arrays
        self._run = _function(library.se_exchange_run, [ctypes.c_int64] * 2 + [ctypes.c_int] * 3)
        library.se_exchange_head.restype = ctypes.POINTER(ctypes.c_int64)
        close = weakref.finalize(self, _close, library, self._exchange, neighbours, os.getpid())
        close.atexit = False

    def run(
        self,
        call: int,
        item_bytes: int,
        parts: Parts,
        *,
        shared: bool = False,
        total: tuple[int, int, int] = (-1, 0, 0),
    ) -> None:
        """Sends each neighbour its part, and takes or sums what they send.

        Args:
            call: Of calls.py.
            item_bytes: Bytes of a number.
            parts: By neighbour: where the part for it begins, its bytes, where the part from it
                goes, its bytes.
            shared: Whether all neighbours get the same part, which is the one for this rank itself.
            total: The dtype, operation and place of the sum of all parts, where they are summed.

        Raises:
            RunError: A neighbour calls something else, has ended, has left or does not come.
        """
        with self._lock:
            if self._broken is not None:
                self._library.se_exchange_leave(self._exchange, _LEFT)
                raise RunError(self._broken)
            self._broken = _INTERRUPTED
            self._from[:], self._sent[:], self._to[:], self._awaited[:] = parts
            code = self._run(self._exchange, call, item_bytes, shared, *total)
            if code != _DONE:
                self._go_on(code, call)
            self._broken = None

    def leave(self) -> None:
        """Tells the neighbours that this rank takes part in nothing more."""
        if self._broken is None:
            self._give_up("the process group was destroyed", _LEFT)

    def _go_on(self, code: int, call: int) -> None:
        """Finishes what others are not ready for yet.

        Raises:
            RunError: They will not be.
        """
        end = None
        try:
            while code == _WAITING:
                if end is None:
                    end = time.monotonic() + self._timeout().total_seconds()
                self._check(call, late=time.monotonic() > end)
                code = self._library.se_exchange_go(self._exchange)
        except BaseException:
            if self._broken == _INTERRUPTED:
                self._give_up(_INTERRUPTED, _LEFT)
            raise
        if code == _MISMATCH:
            self._broken = None  # all have noticed, and are in the same turn still
            raise RunError(self._mismatch())

    def _check(self, call: int, *, late: bool) -> None:
        """Raises if one that is awaited will not come.

        Raises:
            RunError: It is so.
        """
        left: list[tuple[int, int]] = []
        awaited: list[int] = []
        for place, neighbour in enumerate(self._neighbours):
            has_ended = neighbour.handle >= 0 and _is_readable(neighbour.handle)
            why = self._library.se_exchange_peer(self._exchange, place)
            if why < 0:
                continue
            awaited.append(place)
            if has_ended and why < _GAVE_UP:
                text = f"{self._name(place)} has ended, and did not come to {name_of(call)}"
                self._refuse(text, _GAVE_UP + place)
            if why > 0:
                left.append((place, why))
        for place, why in left:
            text = f"{self._name(place)} has left the process group"
            if why >= _GAVE_UP:
                text += f" when it gave up waiting for {self._name(why - _GAVE_UP)}"
            self._refuse(f"{text}, and does not come to {name_of(call)}", why)
        if late:
            names = " and ".join(map(self._name, awaited))
            seconds = self._timeout().total_seconds()
            text = f"{names} did not come to {name_of(call)} within {seconds:g} s"
            self._refuse(text, _GAVE_UP + awaited[0])

    def _refuse(self, text: str, why: int) -> None:
        text += "; see what that rank printed, and start the job again"
        self._give_up(text, why)
        raise RunError(text)

    def _give_up(self, text: str, why: int) -> None:
        self._broken = text
        self._library.se_exchange_leave(self._exchange, why)

    def _name(self, place: int) -> str:
        return f"rank {self._ranks[place]} (process {self._neighbours[place].process})"

    def _mismatch(self) -> str:
        heads = []
        for place in range(self.size):
            words = self._library.se_exchange_head(self._exchange, place)
            heads.append(Head(self._ranks[place], words[: 3 + 2 * self.size], self.size))
        return (
            f"the ranks do not agree on a collective: {difference_of(heads)}; call the same "
            "collectives in the same order on all ranks, with sizes that fit"
        )


def _function(function: Callable[..., int], given: Sequence[type]) -> Callable[..., int]:
    function.argtypes = [ctypes.c_void_p, *given, ctypes.c_void_p]  # type: ignore[attr-defined]
    return function


def _is_readable(file: int) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(0))


def _close(
    library: ctypes.CDLL,
    exchange: ctypes.c_void_p,
    neighbours: Sequence[Neighbour],
    process: int,
) -> None:
    """Gives the memory back; the others keep what they have mapped."""
    if os.getpid() != process:  # a worker that was forked has none of it
        return
    library.se_exchange_leave(exchange, _LEFT)
    library.se_exchange_close(exchange)
    num_bytes = bytes_of(library, len(neighbours))
    for neighbour in neighbours:
        forget(neighbour, library, num_bytes)
