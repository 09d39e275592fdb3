"""How one table lies on the ranks. A layout is a value; `plan_sharding` turns it into shards.

The ranks of a node are neighbours: node n holds ranks n * local_world_size and the next ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class _Layout:
    torchrec_name: ClassVar[str]
    splits_rows: ClassVar[bool] = False
    splits_columns: ClassVar[bool] = False

    def __str__(self) -> str:
        given = [f"{name}={value!r}" for name, value in vars(self).items() if value is not None]
        return f"{self.torchrec_name}({', '.join(given)})" if given else self.torchrec_name


@dataclass(frozen=True, kw_only=True)
class RowWise(_Layout):
    """Each rank holds a block of ceil(num_embeddings / world_size) rows, the last the rest."""

    torchrec_name: ClassVar[str] = "row_wise"
    splits_rows: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class TableWise(_Layout):
    """The whole table lies on one rank.

    Attributes:
        rank: That rank; by default the planner picks it.
    """

    rank: int | None = None
    torchrec_name: ClassVar[str] = "table_wise"

    def __post_init__(self) -> None:
        if self.rank is not None:
            _check_number("table_wise", "rank", self.rank)


@dataclass(frozen=True, kw_only=True)
class ColumnWise(_Layout):
    """Each of some ranks holds an equal slice of the columns of all rows.

    Attributes:
        ranks: Those ranks, each once, in the order of the slices; by default the planner picks.
    """

    ranks: tuple[int, ...] | None = None
    torchrec_name: ClassVar[str] = "column_wise"
    splits_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_numbers(self, "ranks")


@dataclass(frozen=True, kw_only=True)
class TableRowWise(_Layout):
    """The ranks of one node hold the table as `RowWise` would.

    Attributes:
        node: That node; by default the planner picks it.
    """

    node: int | None = None
    torchrec_name: ClassVar[str] = "table_row_wise"
    splits_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.node is not None:
            _check_number("table_row_wise", "node", self.node)


@dataclass(frozen=True, kw_only=True)
class TableColumnWise(_Layout):
    """Some ranks of one node hold the table as `ColumnWise` would.

    Attributes:
        ranks: Those ranks, all of one node; by default the planner picks.
    """

    ranks: tuple[int, ...] | None = None
    torchrec_name: ClassVar[str] = "table_column_wise"
    splits_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_numbers(self, "ranks")


@dataclass(frozen=True, kw_only=True)
class GridShard(_Layout):
    """Each of some nodes holds an equal slice of the columns, dealt out to its ranks by rows.

    Attributes:
        nodes: Those nodes, each once, in the order of the slices; by default the planner picks.
    """

    nodes: tuple[int, ...] | None = None
    torchrec_name: ClassVar[str] = "grid_shard"
    splits_rows: ClassVar[bool] = True
    splits_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_numbers(self, "nodes")


@dataclass(frozen=True, kw_only=True)
class DataParallel(_Layout):
    """Every rank holds the whole table and updates it with the mean gradient of all ranks."""

    torchrec_name: ClassVar[str] = "data_parallel"


Layout = (
    RowWise | TableWise | ColumnWise | TableRowWise | TableColumnWise | GridShard | DataParallel
)
LAYOUTS: dict[str, type[Layout]] = {
    kind.torchrec_name: kind
    for kind in (
        TableWise,
        RowWise,
        ColumnWise,
        TableRowWise,
        TableColumnWise,
        GridShard,
        DataParallel,
    )
}
"""The layouts by TorchRec's names."""


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


def column_wise(ranks: Iterable[int] | None = None) -> ColumnWise:
    """Deals the columns of a table out to ranks: for wide tables.

    Args:
        ranks: The ranks, one for each slice; by default the planner picks them. The slices are
            equal, and with FBGEMM's kernels a multiple of 4 wide.

    Returns:
        The layout.

    Raises:
        ValueError: `ranks` are not different numbers from 0.

    Example:
        >>> str(column_wise(ranks=[0, 1]))
        'column_wise(ranks=(0, 1))'
    """
    return ColumnWise(ranks=_tuple(ranks))


def table_row_wise(node: int | None = None) -> TableRowWise:
    """Deals the rows of a table out to the ranks of one node, which exchange them fast.

    Args:
        node: The node; by default the planner picks one.

    Returns:
        The layout.

    Raises:
        ValueError: `node` is not a number from 0.

    Example:
        >>> str(table_row_wise(node=1))
        'table_row_wise(node=1)'
    """
    return TableRowWise(node=node)


def table_column_wise(ranks: Iterable[int] | None = None) -> TableColumnWise:
    """Deals the columns of a table out to ranks of one node.

    Args:
        ranks: The ranks, all of one node; by default the planner picks them.

    Returns:
        The layout.

    Raises:
        ValueError: `ranks` are not different numbers from 0.

    Example:
        >>> str(table_column_wise(ranks=[2, 3]))
        'table_column_wise(ranks=(2, 3))'
    """
    return TableColumnWise(ranks=_tuple(ranks))


def grid_shard(nodes: Iterable[int] | None = None) -> GridShard:
    """Deals the columns of a table out to nodes, and the rows of each slice to its node's ranks.

    Args:
        nodes: The nodes, one for each slice; by default the planner picks them.

    Returns:
        The layout.

    Raises:
        ValueError: `nodes` are not different numbers from 0.

    Example:
        >>> str(grid_shard(nodes=[0, 1]))
        'grid_shard(nodes=(0, 1))'
    """
    return GridShard(nodes=_tuple(nodes))


def data_parallel() -> DataParallel:
    """Replicates a table on every rank: for tables of some thousand rows.

    Nothing is exchanged in the forward. The gradient of the whole table is averaged over the ranks,
    so the cost of a step grows with the table.

    Example:
        >>> str(data_parallel())
        'data_parallel'
    """
    return DataParallel()


def _tuple(numbers: Iterable[int] | None) -> Any:
    return tuple(numbers) if isinstance(numbers, Iterable) else numbers


def _check_number(layout: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{layout}: {name} must be a number from 0, got {value!r}")


def _check_numbers(layout: ColumnWise | TableColumnWise | GridShard, name: str) -> None:
    values = getattr(layout, name)
    if values is None:
        return
    if not isinstance(values, tuple) or not values:
        raise ValueError(
            f"{layout.torchrec_name}: {name} must be a list of numbers from 0, got {values!r}"
        )
    for value in values:
        _check_number(layout.torchrec_name, name, value)
    if len(set(values)) < len(values):
        raise ValueError(
            f"{layout.torchrec_name}: {name} must differ, got {values!r}; name each once"
        )
