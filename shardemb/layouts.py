"""How one table lies on the ranks. A layout is a value; `plan_sharding` turns it into shards.

Here are row-wise and table-wise. Column-wise, table-row-wise, grid and data-parallel are not
supported yet, and `plan_sharding` never chooses them.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class RowWise:
    """Each rank holds a block of ceil(num_embeddings / world_size) rows, the last the rest."""

    torchrec_name: ClassVar[str] = "row_wise"

    def __str__(self) -> str:
        return "row_wise"


@dataclass(frozen=True, kw_only=True)
class TableWise:
    """The whole table lies on one rank.

    Attributes:
        rank: That rank; by default the planner picks it.
    """

    rank: int | None = None
    torchrec_name: ClassVar[str] = "table_wise"

    def __post_init__(self) -> None:
        if self.rank is not None and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0
        ):
            raise ValueError(f"table_wise: rank must be a number from 0, got {self.rank!r}")

    def __str__(self) -> str:
        return "table_wise" if self.rank is None else f"table_wise(rank={self.rank})"


Layout = RowWise | TableWise


def row_wise() -> RowWise:
    """Deals the rows of a table out to all ranks: for tables too large or too busy for one.

    Example:
        >>> str(row_wise())
        'row_wise'
    """
    return RowWise()


def table_wise(rank: int | None = None) -> TableWise:
    """Puts a whole table on one rank: for tables that are small beside the others.

    Args:
        rank: The rank; by default the planner picks one.

    Returns:
        The layout.

    Raises:
        ValueError: `rank` is not a number from 0.

    Example:
        >>> str(table_wise(rank=1))
        'table_wise(rank=1)'
    """
    return TableWise(rank=rank)


def row_wise_leaves_a_rank_empty(num_embeddings: int, world_size: int) -> bool:
    """Whether a table is too small to give every rank a row, without which TorchRec fails.

    Example:
        >>> row_wise_leaves_a_rank_empty(6, 4)
        True
    """
    rows_per_rank = -(-num_embeddings // world_size)
    return rows_per_rank * (world_size - 1) >= num_embeddings
