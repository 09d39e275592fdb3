"""What to say of tables that do not fit, and which single changes would make them fit."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torchrec.modules.embedding_configs import DataType

from shardemb.constraints import Constraints
from shardemb.layouts import LAYOUTS, Layout
from shardemb.modules.discovery import Table
from shardemb.planning.layout_rules import layouts_allowed
from shardemb.planning.planner import least_bytes, refuse_unfit
from shardemb.planning.problem import Problem, check_problem
from shardemb.planning.search import DoesNotFitError
from shardemb.text import format_bytes

_MORE_NODES = (1, 1.05, 1.1, 1.25, 1.5, 2, 4)
_HEADROOMS = (0.1, 0.05, 0.02, 0.0)


def what_does_not_fit(problem: Problem, error: DoesNotFitError) -> str:
    """Which table needs how much where, how much is there, and what would fit.

    Args:
        problem: What was to be planned.
        error: Where that failed.

    Returns:
        Lines for people; each change that they name was tried.
    """
    names = error.item.names
    used = problem.bytes_per_rank - error.free_bytes
    headroom = problem.constraints.headroom
    text = (
        f"{_tables(names)} as {error.candidate.kind} need{'s' * (len(names) == 1)} "
        f"{format_bytes(error.candidate.num_bytes)} on rank {error.rank}, and "
        f"{format_bytes(error.free_bytes)} are left there: "
        f"{format_bytes(problem.cluster.memory_bytes)} of memory"
        + (f", less {headroom:.3g} of it as headroom" if headroom else "")
        + (f", less {format_bytes(used)} of other tables" if used else "")
    )
    changes = list(_changes(problem, names))
    if not changes and problem.named:
        changes = [
            f"no named layouts, the planner chooses all, and {change}"
            for change in _more_nodes(replace(problem, named={}))
        ]
    if not changes:
        return f"{text}; no single change of a layout, the ranks, a dtype or the headroom would fit"
    return "\n  - ".join([f"{text}. Any one of these changes would fit:", *changes])


def _changes(problem: Problem, names: tuple[str, ...]) -> Iterator[str]:
    """Single changes with which all tables fit, each tried."""
    if len(names) > 1 and _fits(replace(problem, constraints=_without(problem, names))):
        yield f"{_tables(names)} not colocated"
    yield from _other_layouts(problem, names)
    if len(problem.named) > 1 and _fits(replace(problem, named={})):
        yield "no named layouts, the planner chooses all"
    yield from _more_nodes(problem)
    yield from _float16(problem, names)
    for headroom in _HEADROOMS:
        less = replace(problem.constraints, headroom=headroom)
        if headroom < problem.constraints.headroom and _fits(replace(problem, constraints=less)):
            yield f"Constraints(headroom={headroom:.3g}) instead of {problem.constraints.headroom}"
            break


def _other_layouts(problem: Problem, names: tuple[str, ...]) -> Iterator[str]:
    """Other layouts of the tables that do not fit, and their own on other ranks."""
    named = [problem.named[name] for name in names if name in problem.named]
    kinds = set.intersection(
        *(set(layouts_allowed(problem.tables[name], **problem.sizes)) for name in names)
    )
    others: list[Layout] = [LAYOUTS[kind]() for kind in LAYOUTS if kind in kinds]
    for layout in named[:1]:
        elsewhere = type(layout)()
        others = [elsewhere] + [other for other in others if type(other) is not type(layout)]
        if elsewhere == layout:
            del others[0]
    for other in others:
        changed = replace(problem, named={**problem.named, **dict.fromkeys(names, other)})
        given = ", on ranks of the planner's choice" if type(other) in map(type, named) else ""
        if _fits(changed):
            yield f"layouts.{other.torchrec_name}() for {_tables(names)}{given}"
        elif _fits(replace(changed, constraints=_without(problem, names))):
            yield f"layouts.{other.torchrec_name}() for {_tables(names)}, without constraints"


def _without(problem: Problem, names: Iterable[str]) -> Constraints:
    """The constraints without what they say of some tables."""
    names = set(names)
    given = problem.constraints
    return replace(
        given,
        layouts={name: value for name, value in given.layouts.items() if name not in names},
        ranks={name: value for name, value in given.ranks.items() if name not in names},
        colocate=[group for group in given.colocate if not names & set(group)],
        replicate=[name for name in given.replicate if name not in names],
    )


def _more_nodes(problem: Problem) -> Iterator[str]:
    cluster = problem.cluster
    needed = least_bytes(problem) / (problem.bytes_per_rank * cluster.ranks_per_node)
    for factor in _MORE_NODES:
        num_nodes = max(cluster.num_nodes + 1, math.ceil(factor * needed))
        if _fits(replace(problem, cluster=replace(cluster, num_nodes=num_nodes))):
            yield (
                f"{num_nodes} nodes, {num_nodes * cluster.ranks_per_node} ranks, instead of "
                f"{cluster.num_nodes} and {cluster.world_size}"
            )
            break


def _float16(problem: Problem, names: tuple[str, ...]) -> Iterator[str]:
    """Half the bytes for the tables that do not fit, for the largest one, or for all."""
    tables = problem.tables
    largest = max(tables, key=lambda name: tables[name].weight.numel())
    tried = {_tables(names): names, _tables((largest,)): (largest,), "all tables": tuple(tables)}
    for text, chosen in tried.items():
        collections = {
            path: replace(
                found,
                tables={
                    name: _as_float16(table) if name in chosen else table
                    for name, table in found.tables.items()
                },
            )
            for path, found in problem.collections.items()
        }
        if _fits(replace(problem, collections=collections)):
            yield f"dtype='float16' for {text}"
            break


def _as_float16(table: Table) -> Table:
    return replace(table, config=replace(table.config, data_type=DataType.FP16))


def _fits(problem: Problem) -> bool:
    try:
        check_problem(problem)
        refuse_unfit(problem)
    except (ValueError, DoesNotFitError):
        return False
    return True


def _tables(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"table{'s' * (len(names) > 1)} {', '.join(map(repr, names[:5]))}{more}"
