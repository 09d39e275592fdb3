"""Which candidate each table takes, and on which ranks, so that the busiest rank is done soonest.

The aim is TorchRec's (`NoopPerfModel`): the least of the most milliseconds that a rank needs for
its blocks, within each rank's memory. Knows neither tables nor TorchRec.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardemb.planning.candidates import Candidate

# W ranks. Every sum is of one number at a time, so that all machines come to the same plan.

_NUM_LIMITS = 12
_NUM_STARTS = 8
_MOST_TRIALS = 5_000
_MOST_PASSES = 8


@dataclass(frozen=True, kw_only=True)
class Item:
    """A table, or tables that lie together.

    Attributes:
        names: Of the tables.
        candidates: The ways in which it may lie, at least one.
        ranks: Those that may hold any of it; None if all may.
    """

    names: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    ranks: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """What an item takes: a candidate, and the ranks or nodes that it is given."""

    candidate: Candidate
    places: tuple[int, ...]


class DoesNotFitError(Exception):
    """An item that there is no room for, a rank that has too little, and how much is there.

    Where several ranks are needed, it is the fullest of those that have most.
    """

    def __init__(self, item: Item, candidate: Candidate, rank: int, free_bytes: int) -> None:
        super().__init__(f"{item.names} needs {candidate.num_bytes} bytes, there are {free_bytes}")
        self.item = item
        self.candidate = candidate
        self.rank = rank
        self.free_bytes = free_bytes


class _Ranks:
    """The load and the free memory of each rank, and where a candidate would go next."""

    def __init__(self, world_size: int, local_world_size: int, free_bytes: int) -> None:
        self.load_W: npt.NDArray[np.float64] = np.zeros(world_size)
        self.free_W: npt.NDArray[np.int64] = np.full(world_size, free_bytes)
        self._local = local_world_size
        self._all = np.arange(world_size)

    def ranks(self, place: Place) -> npt.NDArray[np.int64]:
        """The ranks that hold some of an item."""
        if place.candidate.places == "all":
            return self._all
        if place.candidate.places == "nodes":
            return np.concatenate([self._node(node) for node in place.places])
        return np.array(place.places)

    def put(self, place: Place, load: float, sign: int = 1) -> None:
        """Gives a place its load and bytes, or with sign -1 takes them away."""
        ranks = self.ranks(place)
        self.load_W[ranks] += sign * load
        self.free_W[ranks] -= sign * place.candidate.num_bytes

    def find(self, candidate: Candidate, allowed: npt.NDArray[np.bool_] | None) -> Place | None:
        """The least loaded ranks or nodes with room for a candidate; None if there are too few."""
        room_W = self.free_W >= candidate.num_bytes
        if allowed is not None:
            room_W &= allowed
        if candidate.places == "all":
            return Place(candidate=candidate, places=()) if room_W.all() else None
        if candidate.named_places is not None:
            place = Place(candidate=candidate, places=candidate.named_places)
            return place if room_W[self.ranks(place)].all() else None
        load_W = np.where(room_W, self.load_W, np.inf)
        if candidate.places == "nodes":
            found = self._least(load_W.reshape(-1, self._local).max(axis=1), candidate.num_places)
        elif candidate.places == "ranks":
            found = self._least(load_W, candidate.num_places, self.free_W)
        else:
            found = self._least_of_a_node(load_W, candidate.num_places)
        return None if found is None else Place(candidate=candidate, places=found)

    def fullest(self, candidate: Candidate, allowed: npt.NDArray[np.bool_] | None) -> int:
        """The rank without room: of the ranks with most room for a candidate, that with least."""
        free_W = self.free_W if allowed is None else np.where(allowed, self.free_W, -1)
        if candidate.places == "all" or candidate.named_places is not None:
            ranks = self.ranks(Place(candidate=candidate, places=candidate.named_places or ()))
            return int(ranks[np.argmin(free_W[ranks])])
        if candidate.places == "ranks":
            return int(np.argsort(-free_W, kind="stable")[candidate.num_places - 1])
        whole = candidate.places == "nodes"
        free_NL = free_W.reshape(-1, self._local)
        number = self._local if whole else candidate.num_places
        local_N = np.argsort(-free_NL, axis=1, kind="stable")[:, number - 1]
        free_N = free_NL[np.arange(len(free_NL)), local_N]
        nodes = np.argsort(-free_N, kind="stable")
        node = int(nodes[candidate.num_places - 1 if whole else 0])
        return node * self._local + int(local_N[node])

    def _least_of_a_node(
        self, load_W: npt.NDArray[np.float64], number: int
    ) -> tuple[int, ...] | None:
        if number > self._local:
            return None
        of_nodes = np.sort(load_W.reshape(-1, self._local), axis=1)
        node = int(np.argmin(of_nodes[:, number - 1]))
        ranks = self._node(node)
        found = self._least(load_W[ranks], number, self.free_W[ranks])
        return None if found is None else tuple(int(ranks[i]) for i in found)

    @staticmethod
    def _least(
        loads: npt.NDArray[np.float64], number: int, free: npt.NDArray[np.int64] | None = None
    ) -> tuple[int, ...] | None:
        """The indices of the least loads, of equal ones those with the most free memory."""
        if number > len(loads):
            return None
        if number > 1:
            order = np.argsort(loads, kind="stable") if free is None else np.lexsort((-free, loads))
            found = order[:number]
        else:
            least = loads == loads.min()
            found = np.array([np.argmax(least if free is None else np.where(least, free, -1))])
        if np.isinf(loads[found]).any():
            return None
        return tuple(map(int, found))

    def _node(self, node: int) -> npt.NDArray[np.int64]:
        return self._all[node * self._local : (node + 1) * self._local]


class Search:
    """Places items on ranks of equal memory."""

    def __init__(
        self, items: Sequence[Item], *, world_size: int, local_world_size: int, free_bytes: int
    ) -> None:
        self._items = items
        self._sizes = (world_size, local_world_size, free_bytes)
        self._allowed: list[npt.NDArray[np.bool_] | None] = [None] * len(items)
        for i, item in enumerate(items):
            if item.ranks is not None:
                self._allowed[i] = np.zeros(world_size, dtype=bool)
                self._allowed[i][list(item.ranks)] = True  # type: ignore[index]

    def best(self) -> list[Place]:
        """The places with the least load of the busiest rank that this search finds.

        Tries, for each of some limits, the candidates of the least work that load no rank by more
        than the limit; then moves what lies on the busiest rank as long as that helps; then lets
        every item take less work where no rank comes above the busiest.

        Returns:
            A place for each item.

        Raises:
            DoesNotFitError: The memory is not enough.
        """
        tried = [
            places
            for limit in self._limits()
            for by_bytes in (False, True)
            if (places := self._try(limit, by_bytes=by_bytes)) is not None
        ]
        starts = sorted(tried, key=self._value)[:_NUM_STARTS] or [self.fit()]
        return self._relieved(min(map(self._improved, starts), key=self._value))

    def fit(self) -> list[Place]:
        """Places that fit, whatever the load: each item on the ranks with the most room.

        Returns:
            A place for each item.

        Raises:
            DoesNotFitError: There are none that this search finds.
        """
        free_bytes = self._sizes[2]
        smallest = [min(item.candidates, key=lambda one: one.num_bytes) for item in self._items]
        largest = max(range(len(smallest)), key=lambda i: smallest[i].num_bytes)
        if smallest[largest].num_bytes > free_bytes:
            empty = _Ranks(*self._sizes)
            item = self._items[largest]
            raise self._failure(item, smallest[largest], empty, self._allowed[largest])
        failed: DoesNotFitError | None = None
        for part in (1, 4, 16, 64):
            try:
                return self._fit(free_bytes // part)
            except DoesNotFitError as error:
                failed = failed or error
        assert failed is not None
        raise failed

    def _limits(self) -> list[float]:
        """Most milliseconds of one item on a rank, from what is best alone down to the least."""
        least = max(min(one.ms for one in item.candidates) for item in self._items)
        most = max(min(item.candidates, key=_work).ms for item in self._items)
        if most <= least or least == 0:
            return [most]
        step = (least / most) ** (1 / (_NUM_LIMITS - 1))
        return [most * step**i for i in range(_NUM_LIMITS - 1)] + [least]

    def _try(self, limit: float, *, by_bytes: bool) -> list[Place] | None:
        chosen = []
        for item in self._items:
            light = [one for one in item.candidates if one.ms <= limit]
            chosen.append(min(light or item.candidates, key=_work))
        places: list[Place | None] = [None] * len(chosen)
        ranks = _Ranks(*self._sizes)
        for i in _in_order(chosen, by_bytes=by_bytes):
            place = ranks.find(chosen[i], self._allowed[i])
            if place is None:
                return None
            ranks.put(place, chosen[i].ms)
            places[i] = place
        return [place for place in places if place is not None]

    def _fit(self, limit: int) -> list[Place]:
        """Gives every item the candidate of the fewest bytes in all, of blocks within a limit."""
        chosen = []
        for item in self._items:
            small = [one for one in item.candidates if one.num_bytes <= limit]
            fewest = min(one.num_bytes for one in item.candidates)
            small = small or [one for one in item.candidates if one.num_bytes == fewest]
            chosen.append(min(small, key=lambda one: (one.num_bytes * one.num_ranks, _work(one))))
        places: dict[int, Place] = {}
        ranks = _Ranks(*self._sizes)
        for i in _in_order(chosen, by_bytes=True):
            place = ranks.find(chosen[i], self._allowed[i])
            if place is None:
                raise self._failure(self._items[i], chosen[i], ranks, self._allowed[i])
            ranks.put(place, chosen[i].num_bytes)
            places[i] = place
        return [places[i] for i in range(len(chosen))]

    @staticmethod
    def _failure(
        item: Item, candidate: Candidate, ranks: _Ranks, allowed: npt.NDArray[np.bool_] | None
    ) -> DoesNotFitError:
        rank = ranks.fullest(candidate, allowed)
        return DoesNotFitError(item, candidate, rank, int(ranks.free_W[rank]))

    def _loaded(self, places: Sequence[Place]) -> _Ranks:
        ranks = _Ranks(*self._sizes)
        for place in places:
            ranks.put(place, place.candidate.ms)
        return ranks

    def _value(self, places: Sequence[Place]) -> tuple[float, float]:
        """The most milliseconds of a rank, and of all ranks together."""
        work = 0.0
        for place in places:
            work += _work(place.candidate)
        return float(self._loaded(places).load_W.max()), work

    def _improved(self, places: list[Place]) -> list[Place]:
        """Moves items off the busiest rank, the move that helps most first, while any helps."""
        places = list(places)
        ranks = self._loaded(places)
        trials = 0
        while trials < _MOST_TRIALS:
            move, tried = self._best_move(places, ranks)
            trials += tried
            if move is None:
                break
            i, new = move
            ranks.put(places[i], places[i].candidate.ms, -1)
            ranks.put(new, new.candidate.ms)
            places[i] = new
        return places

    def _best_move(
        self, places: Sequence[Place], ranks: _Ranks
    ) -> tuple[tuple[int, Place] | None, int]:
        """The move off the busiest rank that helps most, if any does, and how many were tried."""
        busiest = int(np.argmax(ranks.load_W))
        least = float(ranks.load_W[busiest]) * (1 - 1e-9)
        best: tuple[int, Place] | None = None
        trials = 0
        for i, old in enumerate(places):
            if not (ranks.ranks(old) == busiest).any():
                continue
            trials += len(self._items[i].candidates)
            ranks.put(old, old.candidate.ms, -1)
            for after, new in self._moves(i, ranks, busiest):
                if after < least:
                    least, best = after, (i, new)
            ranks.put(old, old.candidate.ms)
        return best, trials

    def _relieved(self, places: list[Place]) -> list[Place]:
        """Gives items candidates of less work, those of most work first, while any has one."""
        places = list(places)
        ranks = self._loaded(places)
        most = float(ranks.load_W.max())
        for _ in range(_MOST_PASSES):
            by_work = sorted(range(len(places)), key=lambda i: -_work(places[i].candidate))
            changed = [i for i in by_work if self._relieve(i, places, ranks, most)]
            if not changed:
                break
        return places

    def _relieve(self, i: int, places: list[Place], ranks: _Ranks, most: float) -> bool:
        """Gives an item the least work with which none of its ranks comes above the most."""
        old = places[i]
        less = [one for one in self._items[i].candidates if _work(one) < _work(old.candidate)]
        if not less:
            return False
        ranks.put(old, old.candidate.ms, -1)
        for candidate in sorted(less, key=_work):
            new = ranks.find(candidate, self._allowed[i])
            if new is not None and ranks.load_W[ranks.ranks(new)].max() + candidate.ms <= most:
                places[i] = new
                break
        ranks.put(places[i], places[i].candidate.ms)
        return places[i] is not old

    def _moves(self, i: int, ranks: _Ranks, busiest: int) -> Iterator[tuple[float, Place]]:
        """Where an item could go, with the most load of those ranks and of the busiest then."""
        for candidate in self._items[i].candidates:
            new = ranks.find(candidate, self._allowed[i])
            if new is not None:
                after = float(ranks.load_W[ranks.ranks(new)].max()) + candidate.ms
                yield max(after, float(ranks.load_W[busiest])), new


def _work(candidate: Candidate) -> float:
    """Milliseconds of all ranks together."""
    return candidate.ms * candidate.num_ranks


def _in_order(chosen: Sequence[Candidate], *, by_bytes: bool) -> Iterable[int]:
    """What leaves no choice first, then what needs many ranks at once, then by size."""
    number_of = {"all": 1, "nodes": 2, "ranks of a node": 3, "ranks": 4}

    def key(i: int) -> tuple[int, float]:
        one = chosen[i]
        order = 0 if one.named_places is not None else number_of[one.places]
        return order, -(one.num_bytes if by_bytes else one.ms)

    return sorted(range(len(chosen)), key=key)
