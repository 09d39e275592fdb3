"""Decides how each table lies: as named, within the constraints, the rest as TorchRec rates it.

TorchRec's planner makes an object for each shard of each option and copies them all for each of its
proposals: 20 tables on 1,024 devices take it 18 s. Here its estimates are taken once for each kind
of block, and `search.py` does what its proposers and partitioner do; `benchmarks/plan.py` compares
both.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from shardemb.constraints import Constraints
from shardemb.kernel_choice import WIDTH_STEP
from shardemb.layouts import LAYOUTS, ColumnWise, DataParallel, GridShard, Layout, TableColumnWise
from shardemb.modules.discovery import Collection, Table
from shardemb.planning.candidates import (
    Candidate,
    candidates_of,
    slice_counts,
    together,
)
from shardemb.planning.contradictions import common_ranks, kinds_of
from shardemb.planning.estimates import estimated
from shardemb.planning.geometry import may_lie_on, placed, places_of
from shardemb.planning.layout_rules import layouts_allowed
from shardemb.planning.problem import Problem
from shardemb.planning.reasons import chosen_by
from shardemb.planning.search import Item, Search
from shardemb.planning.sharders import make_sharders


class Choice(NamedTuple):
    """How a table lies, with its ranks or nodes, and who chose so and why."""

    layout: Layout
    chosen_by: str


def choose_layouts(problem: Problem) -> dict[str, Choice]:
    """Finds for every table a layout with its ranks or nodes.

    Args:
        problem: What is to be planned.

    Returns:
        Choices by table; named layouts as they were named. The same on every machine.

    Raises:
        DoesNotFitError: The tables need more memory than there is.
        ValueError: Tables that must split alike cannot.
    """
    candidates = estimated(
        _candidates(problem),
        problem.collections,
        problem.cluster,
        problem.workload,
        make_sharders(),
    )
    items = _items(problem, candidates)
    places = _search(problem, items).best()
    chosen = {
        name: Choice(
            placed(layout, place.places),
            chosen_by(problem, item, place, position),
        )
        for item, place in zip(items, places, strict=True)
        for position, (name, layout) in enumerate(
            zip(item.names, place.candidate.layouts, strict=True)
        )
    }
    _check_kept(problem, chosen)
    return chosen


def refuse_unfit(problem: Problem) -> None:
    """Returns if the tables fit in the memory, and estimates nothing.

    Args:
        problem: What is to be planned.

    Raises:
        DoesNotFitError: They need more than there is.
        ValueError: Tables that must split alike cannot.
    """
    _search(problem, _items(problem, _candidates(problem))).fit()


def least_bytes(problem: Problem) -> int:
    """Bytes of all tables on all ranks together, by the layouts that need the fewest."""
    return sum(
        min(one.num_bytes * one.num_ranks for one in item.candidates)
        for item in _items(problem, _candidates(problem))
    )


def _search(problem: Problem, items: list[Item]) -> Search:
    return Search(items, free_bytes=problem.bytes_per_rank, **problem.sizes)


def _candidates(problem: Problem) -> dict[str, list[Candidate]]:
    """By table, the ways in which it may lie.

    Raises:
        ValueError: A table of sequences does not split as another of its collection does.
    """
    found: dict[str, list[Candidate]] = {}
    for collection in problem.collections.values():
        for name, table in collection.tables.items():
            found[name] = []
            for layout in _layouts_of(problem, table):
                num_slices = _num_slices(problem, collection, table, layout)
                found[name] += candidates_of(table, layout, problem.cluster, num_slices)
            if not (found[name] or collection.is_pooled):
                raise ValueError(_why_not_sliced_alike(problem, collection, name))
    return found


def _num_slices(
    problem: Problem, collection: Collection, table: Table, layout: Layout
) -> list[int]:
    """Numbers of slices to try of a table whose ranks are not named."""
    if not layout.splits_columns:
        return [1]
    most = _most_slices(problem, layout, table.name)
    if not collection.is_pooled:
        return [number for number in [_slices_of_sequences(problem, collection)] if number <= most]
    width = table.config.embedding_dim
    for group in problem.constraints.colocate:
        named = [problem.named[name] for name in group if name in problem.named]
        given = [places_of(other) for other in named if other.splits_columns]
        if table.name in group and any(given):
            counts = [len(places) for places in given if places]
            step = WIDTH_STEP[problem.kernel]
            return [count for count in counts if width % (step * count) == 0]
    return slice_counts(width, most, problem.kernel)


def _layouts_of(problem: Problem, table: Table) -> list[Layout]:
    if table.name in problem.named:
        return [problem.named[table.name]]
    constraints = problem.constraints
    kinds = kinds_of(constraints, table, **problem.sizes)
    with_others = len(_group_of(constraints, table.name)) > 1
    if table.name not in constraints.layouts and not with_others:
        simplest = layouts_allowed(table, **problem.sizes)
        kinds = [kind for kind in kinds if kind in simplest] or kinds
    ranks = common_ranks(constraints, _group_of(constraints, table.name))
    return [
        layout
        for layout in (LAYOUTS[kind]() for kind in kinds)
        if ranks is None or may_lie_on(layout, ranks, **problem.sizes)
    ]


def _group_of(constraints: Constraints, table: str) -> Sequence[str]:
    """The tables that lie together with one, itself among them."""
    return next((group for group in constraints.colocate if table in group), (table,))


def _most_slices(problem: Problem, layout: Layout, table: str) -> int:
    """Different ranks or nodes that there are for the slices of a table."""
    cluster = problem.cluster
    ranks = common_ranks(problem.constraints, _group_of(problem.constraints, table))
    if ranks is None:
        of_nodes = [cluster.ranks_per_node] * cluster.num_nodes
    else:
        of_nodes = list(Counter(rank // cluster.ranks_per_node for rank in ranks).values())
    if isinstance(layout, GridShard):
        return of_nodes.count(cluster.ranks_per_node)
    return max(of_nodes) if isinstance(layout, TableColumnWise) else sum(of_nodes)


def _slices_of_sequences(problem: Problem, collection: Collection) -> int:
    """One number of slices for all tables of a sequence collection; `check_slices` says why."""
    pinned = _pinned_slices(problem, collection)
    if pinned is not None:
        return len(places_of(problem.named[pinned]) or ())
    on_a_node = any(
        isinstance(problem.named.get(name), TableColumnWise)
        or TableColumnWise.torchrec_name in problem.constraints.layout_names.get(name, ())
        for name in collection.tables
    )
    layout = TableColumnWise() if on_a_node else ColumnWise()
    most = min(_most_slices(problem, layout, name) for name in collection.tables)
    width = next(iter(collection.tables.values())).config.embedding_dim
    return slice_counts(width, most, problem.kernel)[-1]


def _pinned_slices(problem: Problem, collection: Collection) -> str | None:
    """The first table whose slices are named with their ranks."""
    for name in collection.tables:
        layout = problem.named.get(name)
        if layout is not None and layout.splits_columns and places_of(layout):
            return name
    return None


def _why_not_sliced_alike(problem: Problem, collection: Collection, table: str) -> str:
    """What speaks against a table of sequences that may only be split, and not as another is."""
    other = _pinned_slices(problem, collection)
    assert other is not None, table
    number = _slices_of_sequences(problem, collection)
    kinds = _layouts_of(problem, problem.tables[table])
    most = max(_most_slices(problem, kind, table) for kind in kinds)
    return (
        f"tables {other!r} and {table!r} are of one EmbeddingCollection, whose slices TorchRec "
        f"needs of one width: {other!r} is named {problem.named[other]}, {number} slices, and "
        f"{table!r} may be {' or '.join(map(str, kinds))} on {most} ranks only; allow {table!r} "
        f"more ranks or another layout, name fewer for {other!r}, or give each a collection"
    )


def _items(problem: Problem, candidates: Mapping[str, list[Candidate]]) -> list[Item]:
    """Groups of tables that lie together, and every other table by itself.

    Raises:
        ValueError: The columns of a group do not split alike.
    """
    groups = [tuple(group) for group in problem.constraints.colocate]
    grouped = {name for group in groups for name in group}
    groups += [(name,) for name in candidates if name not in grouped]
    items = [
        Item(
            names=group,
            candidates=tuple(together([candidates[name] for name in group])),
            ranks=common_ranks(problem.constraints, group),
        )
        for group in groups
    ]
    for item in items:
        if not item.candidates:
            raise ValueError(
                f"tables {', '.join(map(repr, item.names))} are colocated, and there is no number "
                "of slices that suits the columns of all; give them embedding_dims that split alike"
            )
    return items


def _check_kept(problem: Problem, chosen: Mapping[str, Choice]) -> None:
    """Fails where a bug made a plan that keeps neither to names nor to constraints."""
    constraints = problem.constraints
    for name, (layout, _) in chosen.items():
        named = problem.named.get(name)
        if named is not None:
            places = places_of(named) or places_of(layout) or ()
            assert layout == placed(named, places), name
        assert layout.torchrec_name in constraints.layout_names.get(name, LAYOUTS), name
        assert name not in constraints.replicate or isinstance(layout, DataParallel), name
        ranks = constraints.ranks.get(name)
        assert ranks is None or may_lie_on(layout, ranks, **problem.sizes), name
    for first, *others in constraints.colocate:
        for other in others:
            a, b = chosen[first].layout, chosen[other].layout
            assert type(a) is type(b), (first, other)
            assert places_of(a) == places_of(b), (first, other)
