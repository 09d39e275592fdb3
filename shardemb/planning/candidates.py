"""The ways in which a table may lie, and their bytes, which are exact. Chooses none of them."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from shardemb.cluster import Cluster
from shardemb.kernel_choice import WIDTH_STEP, Kernel
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
from shardemb.planning.geometry import bytes_of_block, largest_block, num_row_blocks, places_of

if TYPE_CHECKING:  # the search knows the candidates, and not TorchRec
    from shardemb.modules.discovery import Table

_NARROWEST_SLICE = 32
"""Columns that FBGEMM's kernels read at a time at least: TorchRec's estimates count no fewer."""

Places = Literal["ranks", "ranks of a node", "nodes", "all"]
_PLACES: dict[type[Layout], Places] = {
    TableWise: "ranks",
    RowWise: "all",
    ColumnWise: "ranks",
    TableRowWise: "nodes",
    TableColumnWise: "ranks of a node",
    GridShard: "nodes",
    DataParallel: "all",
}


class Cost(NamedTuple):
    """Milliseconds of a step on each rank that holds a block of a table."""

    lookup_ms: float
    exchange_ms: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way in which a table, or tables that lie together, may lie.

    Attributes:
        layouts: By table; all of one kind.
        named_places: The ranks or nodes that were named; None if they are still to be found.
        places: What it is to be given: different ranks, different ranks of one node, or different
            nodes. "all" is all ranks.
        num_places: How many of them.
        num_ranks: Ranks that hold some of it.
        num_bytes: Bytes of the largest blocks, of weights and optimizer state.
        costs: By table.
        ms: Milliseconds of a step on each of its ranks.
    """

    layouts: tuple[Layout, ...]
    named_places: tuple[int, ...] | None
    places: Places
    num_places: int
    num_ranks: int
    num_bytes: int
    costs: tuple[Cost, ...] = ()
    ms: float = 0.0

    @property
    def kind(self) -> str:
        """TorchRec's name of the layout."""
        return self.layouts[0].torchrec_name


def slice_counts(width: int, most: int, kernel: Kernel) -> list[int]:
    """Numbers of slices into which columns may be split, each as wide as FBGEMM reads at a time.

    Args:
        width: Number of columns.
        most: The most slices.
        kernel: What takes the slices; widths that FBGEMM takes come first with any.

    Returns:
        Numbers from 2; if there is none of that width, the smallest number of narrower slices, and
        if there is none either, 1.

    Example:
        >>> slice_counts(128, 8, "fbgemm"), slice_counts(48, 8, "fbgemm")
        ([2, 4], [2])
        >>> slice_counts(6, 8, "fbgemm"), slice_counts(6, 8, "native")
        ([1], [2])
    """
    for step in (WIDTH_STEP["fbgemm"], WIDTH_STEP[kernel]):
        counts = [n for n in range(2, most + 1) if width % (step * n) == 0]
        wide = [n for n in counts if width // n >= _NARROWEST_SLICE]
        if counts:
            return wide or counts[:1]
    return [1]


def candidates_of(
    table: "Table", layout: Layout, cluster: Cluster, num_slices: list[int]
) -> list[Candidate]:
    """The ways to lay a table by a layout, not estimated yet.

    Args:
        table: The table.
        layout: With ranks or nodes where they are named.
        cluster: The ranks.
        num_slices: Numbers of slices to try where no ranks are named; one where columns are whole.

    Returns:
        One for each number of slices.
    """
    named = places_of(layout)
    splits = layout.splits_columns
    counts = num_slices if named is None else [len(named) if splits else 1]
    sizes = {"world_size": cluster.world_size, "local_world_size": cluster.ranks_per_node}
    copies = cluster.world_size if isinstance(layout, DataParallel) else 1
    shape = table.config.num_embeddings, table.config.embedding_dim
    optimizer = table.training.optimizer if table.trainable else None
    return [
        Candidate(
            layouts=(layout,),
            named_places=named,
            places=_PLACES[type(layout)],
            num_places=count,
            num_ranks=num_row_blocks(layout, **sizes) * count * copies,
            num_bytes=sum(
                bytes_of_block(
                    *largest_block(layout, shape, count, **sizes),
                    dtype=table.dtype,
                    optimizer=optimizer,
                )
            ),
        )
        for count in counts
    ]


def together(candidates: list[list[Candidate]]) -> list[Candidate]:
    """The ways in which tables may lie together: by one layout, on the same ranks.

    Args:
        candidates: Of each table.

    Returns:
        One for each kind and number of places that all of them have; the ranks of any that names
        them are the ranks of all.
    """
    by_way = [{(one.kind, one.num_places): one for one in of} for of in candidates]
    return [
        _joined([of[way] for of in by_way]) for way in by_way[0] if all(way in of for of in by_way)
    ]


def _joined(ones: list[Candidate]) -> Candidate:
    if len(ones) == 1:
        return ones[0]
    named = [one.named_places for one in ones if one.named_places is not None]
    return replace(
        ones[0],
        layouts=tuple(layout for one in ones for layout in one.layouts),
        named_places=named[0] if named else None,
        num_bytes=sum(one.num_bytes for one in ones),
        costs=tuple(cost for one in ones for cost in one.costs),
        ms=sum(one.ms for one in ones),
    )
