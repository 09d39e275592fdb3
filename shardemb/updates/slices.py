"""Sums over whole rows, where ranks hold different columns of them."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def run_together(
    updates: Iterable[tuple[Generator[torch.Tensor, torch.Tensor, T], dist.ProcessGroup | None]],
) -> list[T]:
    """Runs updates side by side, with one collective a round for each group of ranks.

    Args:
        updates: Each with the ranks that hold the other columns of its rows, if there are any. All
            ranks of a group run the same updates of it in the same order.

    Returns:
        What each returned.
    """
    runs = [_Run(update, group) for update, group in updates]
    while waiting := [(run, run.asked) for run in runs if run.asked is not None]:
        totals = _summed([asked for _, asked in waiting], [run.group for run, _ in waiting])
        for (run, _), total in zip(waiting, totals, strict=True):
            run.go_on(total)
    return [run.result for run in runs]


class _Run(Generic[T]):
    """An update, and what it asks for or has returned."""

    result: T

    def __init__(
        self,
        update: Generator[torch.Tensor, torch.Tensor, T],
        group: dist.ProcessGroup | None,
    ) -> None:
        self.group, self._update = group, update
        self._step(lambda: next(update))

    def go_on(self, total: torch.Tensor) -> None:
        self._step(lambda: self._update.send(total))

    def _step(self, step: Callable[[], torch.Tensor]) -> None:
        self.asked: torch.Tensor | None = None
        try:
            self.asked = step()
        except StopIteration as end:
            self.result = end.value


def _summed(
    parts: Sequence[torch.Tensor], groups: Sequence[dist.ProcessGroup | None]
) -> list[torch.Tensor]:
    """Each part, where it has a group summed over its ranks."""
    totals = list(parts)
    for group in dict.fromkeys(group for group in groups if group is not None):
        own = [number for number, its in enumerate(groups) if its is group]
        flat = torch.cat([parts[number].flatten() for number in own])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([parts[number].numel() for number in own])
        for number, piece in zip(own, pieces, strict=True):
            totals[number] = piece.view_as(parts[number])
    return totals


def groups_of_slices(
    rank_sets: Iterable[Sequence[int]], *, device: torch.device
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """A process group for each set of ranks, made on all ranks together.

    Args:
        rank_sets: Sets of at least two ranks, the same on every rank.
        device: Of the tables.

    Returns:
        Groups by their ranks, ascending.
    """
    world = dist.group.WORLD
    assert world is not None
    timeout = world._get_backend(device).options._timeout
    return {
        ranks: world if len(ranks) == world.size() else dist.new_group(list(ranks), timeout=timeout)
        for ranks in sorted({tuple(sorted(ranks)) for ranks in rank_sets})
    }
