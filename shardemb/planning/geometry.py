"""Which block of a table, of how many bytes, lies on which rank. Arithmetic only."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from shardemb.config import BYTES_OF
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
from shardemb.optim import SparseOptimizer


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


def num_row_blocks(layout: Layout, *, world_size: int, local_world_size: int) -> int:
    """Over how many ranks the rows of a table, or of each slice of its columns, are split.

    Args:
        layout: How it lies.
        world_size: Number of ranks.
        local_world_size: Number of ranks on each node.

    Returns:
        1 where rows are not split.

    Example:
        >>> num_row_blocks(GridShard(), world_size=16, local_world_size=8)
        8
    """
    if not layout.splits_rows:
        return 1
    return world_size if isinstance(layout, RowWise) else local_world_size


def largest_block(
    layout: Layout,
    shape: tuple[int, int],
    num_slices: int,
    *,
    world_size: int,
    local_world_size: int,
) -> tuple[int, int]:
    """Rows and columns of the largest block of a table, wherever it lies.

    Args:
        layout: How it lies; its ranks or nodes need not be given.
        shape: Rows and columns of the table.
        num_slices: Number of slices of its columns.
        world_size: Number of ranks.
        local_world_size: Number of ranks on each node.

    Returns:
        Both numbers; blocks of equal columns differ in the last rows only.

    Example:
        >>> largest_block(RowWise(), (10, 8), 1, world_size=4, local_world_size=4)
        (3, 8)
    """
    over = num_row_blocks(layout, world_size=world_size, local_world_size=local_world_size)
    return -(-shape[0] // over), shape[1] // num_slices


def bytes_of_block(
    num_rows: int, num_columns: int, *, dtype: str, optimizer: SparseOptimizer | None
) -> tuple[int, int]:
    """Bytes of the weights and of the optimizer state of a block of a table.

    Args:
        num_rows: Rows of the block.
        num_columns: Columns of the block.
        dtype: Of its rows.
        optimizer: What updates them; None where nothing does.

    Returns:
        Both; what is not trained has no optimizer state, and of a row's own state each slice of its
        columns has a copy.

    Example:
        >>> from shardemb.optim import RowWiseAdagrad
        >>> bytes_of_block(5, 8, dtype="float16", optimizer=RowWiseAdagrad(lr=0.1))
        (80, 20)
    """
    weights = num_rows * num_columns * BYTES_OF[dtype]
    return weights, optimizer.state_bytes(num_rows, num_columns) if optimizer else 0


def a_rank_stays_empty(num_rows: int, num_ranks: int) -> bool:
    """Whether a table is too small to give each of some ranks a row, without which TorchRec fails.

    Example:
        >>> a_rank_stays_empty(6, 4)
        True
    """
    rows_per_rank = -(-num_rows // num_ranks)
    return rows_per_rank * (num_ranks - 1) >= num_rows


def places_of(layout: Layout) -> tuple[int, ...] | None:
    """The ranks or nodes that a layout names; None if it names none.

    Example:
        >>> places_of(TableWise(rank=3)), places_of(RowWise())
        ((3,), None)
    """
    if isinstance(layout, TableWise):
        return None if layout.rank is None else (layout.rank,)
    if isinstance(layout, TableRowWise):
        return None if layout.node is None else (layout.node,)
    if isinstance(layout, (ColumnWise, TableColumnWise)):
        return layout.ranks
    return layout.nodes if isinstance(layout, GridShard) else None


def placed(layout: Layout, places: Sequence[int]) -> Layout:
    """A layout with its ranks or nodes; one that lies on all ranks has none to be given.

    Example:
        >>> placed(TableWise(), [3])
        TableWise(rank=3)
    """
    if isinstance(layout, TableWise):
        return replace(layout, rank=places[0])
    if isinstance(layout, TableRowWise):
        return replace(layout, node=places[0])
    if isinstance(layout, (ColumnWise, TableColumnWise)):
        return replace(layout, ranks=tuple(places))
    return replace(layout, nodes=tuple(places)) if isinstance(layout, GridShard) else layout


def may_lie_on(
    layout: Layout, ranks: Collection[int], *, world_size: int, local_world_size: int
) -> bool:
    """Whether some ranks are enough for a layout: those it names, or any if it names none.

    Args:
        layout: The layout.
        ranks: The ranks that may hold some of the table.
        world_size: Number of ranks.
        local_world_size: Number of ranks on each node.

    Returns:
        Whether there is a way to place it.

    Example:
        >>> may_lie_on(RowWise(), {0, 1}, world_size=4, local_world_size=2)
        False
        >>> may_lie_on(TableRowWise(), {0, 1}, world_size=4, local_world_size=2)
        True
    """
    ranks = set(ranks)
    nodes = [
        node
        for node in range(world_size // local_world_size)
        if ranks.issuperset(_ranks_of_node(node, local_world_size))
    ]
    if isinstance(layout, (RowWise, DataParallel)):
        return len(nodes) == world_size // local_world_size
    there = nodes if isinstance(layout, (TableRowWise, GridShard)) else ranks
    places = places_of(layout)
    return bool(there) if places is None else set(places) <= set(there)


def _ranks_of_node(node: int, local_world_size: int) -> range:
    return range(node * local_world_size, (node + 1) * local_world_size)


def _rows_of(ranks: Sequence[int], num_rows: int) -> list[tuple[int, int, int]]:
    """Rank, first row and number of rows, ceil(num_rows / ranks) each and the last the rest."""
    rows_per_rank = -(-num_rows // len(ranks))
    return [
        (rank, first, min(rows_per_rank, num_rows - first))
        for rank, first in zip(ranks, range(0, num_rows, rows_per_rank), strict=False)
    ]
