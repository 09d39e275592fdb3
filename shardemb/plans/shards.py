"""From a layout to the shards of a table with their bytes, and back."""

import functools
from typing import get_args

from shardemb.cluster import Cluster
from shardemb.layouts import LAYOUTS, GridShard, Layout, TableRowWise
from shardemb.optim import SGD, SparseOptimizer
from shardemb.placement import Shard, TablePlacement
from shardemb.planning.geometry import blocks_of, bytes_of_block, placed

_EXAMPLES = (*(kind(lr=1.0) for kind in get_args(SparseOptimizer)), SGD(lr=1.0, momentum=0.5))
OPTIMIZERS: dict[str, SparseOptimizer | None] = {
    "none": None,
    **{example.plan_name: example for example in _EXAMPLES},
}
"""One of each name that a plan has for them, with its state; a table that is not trained has none.
"""


@functools.lru_cache(maxsize=1024)
def shards_of(
    layout: Layout,
    shape: tuple[int, int],
    *,
    ranks: tuple[int, int],
    dtype: str,
    optimizer: str,
) -> tuple[Shard, ...]:
    """The shards of a table; tables of one kind share them.

    Args:
        layout: How it lies; its ranks or nodes are given.
        shape: Rows and columns of the table.
        ranks: Number of ranks, and of ranks on each node.
        dtype: Of its rows.
        optimizer: Name of its sparse optimizer, or "none".

    Returns:
        The blocks of `geometry.blocks_of` with their bytes.

    Example:
        >>> from shardemb import layouts
        >>> kind = {"dtype": "float16", "optimizer": "RowWiseAdagrad"}
        >>> one, two = shards_of(layouts.row_wise(), (10, 8), ranks=(2, 2), **kind)
        >>> two.first_row, two.weight_bytes, two.optimizer_bytes
        (5, 80, 20)
    """
    world_size, local_world_size = ranks
    of_name = OPTIMIZERS[optimizer]
    blocks = blocks_of(layout, shape, world_size=world_size, local_world_size=local_world_size)
    num_bytes = [
        bytes_of_block(block.num_rows, block.num_columns, dtype=dtype, optimizer=of_name)
        for block in blocks
    ]
    return tuple(
        Shard(**block._asdict(), weight_bytes=weights, optimizer_bytes=state)
        for block, (weights, state) in zip(blocks, num_bytes, strict=True)
    )


def layout_of(table: TablePlacement, cluster: Cluster) -> Layout | None:
    """The layout that gives a table its shards.

    Args:
        table: The table and its shards.
        cluster: The ranks.

    Returns:
        The layout with its ranks or nodes, or None if no layout of that name has these shards.
    """
    layout = LAYOUTS[table.layout]()
    places = [shard.rank for shard in table.shards]
    if isinstance(layout, (TableRowWise, GridShard)):
        places = list(dict.fromkeys(rank // cluster.ranks_per_node for rank in places))
    try:
        layout = placed(layout, places)
    except (ValueError, IndexError):  # a rank twice, or no shards
        return None
    return layout if shards_like(table, layout, cluster) == table.shards else None


def shards_like(table: TablePlacement, layout: Layout, cluster: Cluster) -> tuple[Shard, ...]:
    """The shards that a table would have under a layout, with its ranks or nodes given."""
    return shards_of(
        layout,
        (table.num_embeddings, table.embedding_dim),
        ranks=(cluster.world_size, cluster.ranks_per_node),
        dtype=table.dtype,
        optimizer=table.optimizer,
    )
