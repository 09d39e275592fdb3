"""Which block of a table lies on which rank under each layout. Arithmetic only."""

from collections.abc import Sequence
from typing import NamedTuple

from shardemb.layouts import (
    ColumnWise,
    DataParallel,
    GridShard,
    Layout,
    RowWise,
    TableColumnWise,
    TableRowWise,
    TableWise,
)


class Block(NamedTuple):
    """A rank and what it holds of a table: some rows of some columns."""

    rank: int
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int


def blocks_of(
    layout: Layout, shape: tuple[int, int], *, world_size: int, local_world_size: int
) -> list[Block]:
    """The blocks of a table, by slice of columns and within it by rows.

    Args:
        layout: How it lies; its ranks or nodes are given.
        shape: Rows and columns of the table.
        world_size: Number of ranks.
        local_world_size: Number of ranks on each node.

    Returns:
        The blocks; they cover the table once, and under `DataParallel` once for each rank.

    Example:
        >>> blocks_of(RowWise(), (10, 8), world_size=2, local_world_size=2)[1]
        Block(rank=1, first_row=5, num_rows=5, first_column=0, num_columns=8)
    """
    num_rows, num_columns = shape
    if isinstance(layout, DataParallel):
        return [Block(rank, 0, num_rows, 0, num_columns) for rank in range(world_size)]
    if isinstance(layout, TableWise):
        assert layout.rank is not None
        slices: list[Sequence[int]] = [[layout.rank]]
    elif isinstance(layout, RowWise):
        slices = [range(world_size)]
    elif isinstance(layout, (ColumnWise, TableColumnWise)):
        assert layout.ranks is not None
        slices = [[rank] for rank in layout.ranks]
    elif isinstance(layout, TableRowWise):
        assert layout.node is not None
        slices = [_ranks_of_node(layout.node, local_world_size)]
    else:
        assert isinstance(layout, GridShard)
        assert layout.nodes is not None
        slices = [_ranks_of_node(node, local_world_size) for node in layout.nodes]
    width = num_columns // len(slices)
    return [
        Block(rank, first_row, block_rows, position * width, width)
        for position, ranks in enumerate(slices)
        for rank, first_row, block_rows in _rows_of(ranks, num_rows)
    ]


def a_rank_stays_empty(num_rows: int, num_ranks: int) -> bool:
    """Whether a table is too small to give each of some ranks a row, without which TorchRec fails.

    Example:
        >>> a_rank_stays_empty(6, 4)
        True
    """
    rows_per_rank = -(-num_rows // num_ranks)
    return rows_per_rank * (num_ranks - 1) >= num_rows


def _ranks_of_node(node: int, local_world_size: int) -> range:
    return range(node * local_world_size, (node + 1) * local_world_size)


def _rows_of(ranks: Sequence[int], num_rows: int) -> list[tuple[int, int, int]]:
    """Rank, first row and number of rows, ceil(num_rows / ranks) each and the last the rest."""
    rows_per_rank = -(-num_rows // len(ranks))
    return [
        (rank, first, min(rows_per_rank, num_rows - first))
        for rank, first in zip(ranks, range(0, num_rows, rows_per_rank), strict=False)
    ]
