"""Sums over whole rows, where ranks hold different columns of them."""

from collections.abc import Generator, Iterable, Sequence

import torch
import torch.distributed as dist

Update = Generator[torch.Tensor, torch.Tensor, None]


def run_together(updates: Iterable[tuple[Update, dist.ProcessGroup | None]]) -> None:
    """Runs updates side by side, with one collective a round for each group of ranks.

    Args:
        updates: Each with the ranks that hold the other columns of its rows, if there are any. All
            ranks of a group run the same updates of it in the same order.
    """
    waiting = [(update, group, next(update, None)) for update, group in updates]
    while waiting := [entry for entry in waiting if entry[2] is not None]:
        sums = [part for _, _, part in waiting if part is not None]
        totals = _summed(sums, [group for _, group, _ in waiting])
        waiting = [
            (update, group, _sent(update, total))
            for (update, group, _), total in zip(waiting, totals, strict=True)
        ]


def _sent(update: Update, total: torch.Tensor) -> torch.Tensor | None:
    try:
        return update.send(total)
    except StopIteration:
        return None


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
    rank_sets: Iterable[Sequence[int]],
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """A process group for each set of ranks, made on all ranks together.

    Args:
        rank_sets: Sets of at least two ranks, the same on every rank.

    Returns:
        Groups by their ranks.
    """
    sets = sorted({tuple(ranks) for ranks in rank_sets})
    return {ranks: dist.new_group(list(ranks)) for ranks in sets}
