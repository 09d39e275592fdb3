"""Which layouts a table may have: those that are computed rightly, and no others."""

from shardemb.layouts import (
    LAYOUTS,
    ColumnWise,
    DataParallel,
    GridShard,
    Layout,
    RowWise,
    TableColumnWise,
    TableRowWise,
    TableWise,
)
from shardemb.modules.discovery import Table
from shardemb.placement import ShardingPlan
from shardemb.planning.geometry import a_rank_stays_empty, num_row_blocks, places_of


def why_not(table: Table, layout: Layout, *, world_size: int, local_world_size: int) -> str | None:
    """What speaks against a layout of a table, whatever the kernel, and what to use instead.

    Args:
        table: The table.
        layout: Its layout; ranks or nodes may be left to the planner.
        world_size: Number of ranks.
        local_world_size: Number of ranks on each node.

    Returns:
        The reason, to stand after the table's name, or None if there is none.
    """
    return (
        _why_not_there(layout, world_size, local_world_size)
        or _why_not_of_kind(table, layout)
        or _why_not_rows(table, layout, world_size, local_world_size)
    )


def _why_not_there(layout: Layout, world_size: int, local_world_size: int) -> str | None:
    places = places_of(layout) or ()
    if isinstance(layout, (TableRowWise, GridShard)):
        num_nodes = world_size // local_world_size
        if any(node >= num_nodes for node in places):
            return (
                f"{layout} is planned for {num_nodes} node{'s' * (num_nodes > 1)}; use nodes in "
                f"0..{num_nodes - 1}"
            )
        return None
    if any(rank >= world_size for rank in places):
        return f"{layout} is planned for {world_size} ranks; use ranks in 0..{world_size - 1}"
    if isinstance(layout, TableColumnWise):
        of_nodes = sorted({rank // local_world_size for rank in places})
        if len(of_nodes) > 1:
            return (
                f"{layout} names ranks of nodes {of_nodes}, of {local_world_size} ranks each; "
                "use ranks of one node, or column_wise"
            )
    return None


def _why_not_of_kind(table: Table, layout: Layout) -> str | None:
    if table.pooling is None and isinstance(layout, (TableRowWise, GridShard)):
        return (
            f"{layout.torchrec_name} is not supported for sequences, TorchRec refuses it; use "
            "row_wise, column_wise or table_wise"
        )
    if isinstance(layout, DataParallel) and table.dtype != "float32":
        return (
            f"data_parallel is not supported for {table.dtype}, whose gradients would be averaged "
            "in 16 bits; use table_wise, or dtype='float32'"
        )
    return None


def _why_not_rows(
    table: Table, layout: Layout, world_size: int, local_world_size: int
) -> str | None:
    over = num_row_blocks(layout, world_size=world_size, local_world_size=local_world_size)
    num_rows = table.config.num_embeddings
    if a_rank_stays_empty(num_rows, over):
        return (
            f"{layout.torchrec_name} over {over} ranks leaves a rank without rows, the table has "
            f"{num_rows}; use table_wise()"
        )
    return None


def layouts_allowed(table: Table, *, world_size: int, local_world_size: int) -> list[str]:
    """TorchRec's names of the layouts that a planner may choose for a table.

    Among layouts that are one and the same on such ranks (`row_wise` and `table_row_wise` on one
    node), the simplest. Replicas of sequences are left to those who name them.

    Args:
        table: The table.
        world_size: Number of ranks.
        local_world_size: Number of ranks on each node.

    Returns:
        The names, `table_wise` always among them.
    """
    simplest: tuple[type[Layout], ...] = (TableWise,)
    if world_size > 1:
        simplest += (RowWise, ColumnWise, *((DataParallel,) if table.pooling else ()))
    if 1 < local_world_size < world_size:
        simplest += (TableRowWise, TableColumnWise, GridShard)
    return [
        name
        for name, kind in LAYOUTS.items()
        if kind in simplest
        and why_not(table, kind(), world_size=world_size, local_world_size=local_world_size) is None
    ]


def check_slices(plan: ShardingPlan) -> None:
    """Refuses slices of two widths in one sequence collection, which TorchRec would mix up.

    Args:
        plan: A plan of named layouts.

    Raises:
        ValueError: There are two.
    """
    widths: dict[str, tuple[int, str]] = {}
    for table in plan.tables:
        if table.pooling is not None or "column" not in table.layout:
            continue
        width = table.shards[0].num_columns
        first_width, first = widths.setdefault(table.module, (width, table.table))
        if width != first_width:
            raise ValueError(
                f"tables {first!r} and {table.table!r} of one EmbeddingCollection have slices of "
                f"{first_width} and {width} columns, and TorchRec needs one width; give both the "
                "same number of slices, or a collection each"
            )
