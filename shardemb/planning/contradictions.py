"""Whether constraints contradict named layouts, the tables or each other."""

from collections.abc import Iterable, Mapping, Sequence

from shardemb.constraints import Constraints
from shardemb.layouts import LAYOUTS, DataParallel, Layout
from shardemb.modules.discovery import Table
from shardemb.planning.geometry import may_lie_on, places_of
from shardemb.planning.layout_rules import why_not
from shardemb.text import some_names


def check_constraints(
    constraints: Constraints,
    tables: Mapping[str, Table],
    named: Mapping[str, Layout],
    *,
    world_size: int,
    local_world_size: int,
) -> None:
    """Refuses constraints that no plan can keep to, whatever the memory.

    Args:
        constraints: The constraints.
        tables: All tables of the model.
        named: The layouts that are named.
        world_size: Number of ranks.
        local_world_size: Number of ranks on each node.

    Raises:
        ValueError: A table is unknown, a rank is out of range, or a table is left without a layout;
            the message names the table and what contradicts what.
    """
    _check_names(constraints, tables)
    sizes = {"world_size": world_size, "local_world_size": local_world_size}
    for name, ranks in constraints.ranks.items():
        if max(ranks) >= world_size:
            raise ValueError(
                f"constraints: table {name!r} may lie on rank {max(ranks)}, and the plan is for "
                f"{world_size} ranks; use ranks in 0..{world_size - 1}"
            )
    for name, table in tables.items():
        reason = _why_none(constraints, table, named.get(name), sizes)
        if reason:
            raise ValueError(f"table {name!r} {reason}")
    for group in constraints.colocate:
        _check_group(constraints, group, tables, named, sizes)


def kinds_of(
    constraints: Constraints, table: Table, *, world_size: int, local_world_size: int
) -> list[str]:
    """Names of the layouts that constraints leave to a table which none is named for.

    Args:
        constraints: The constraints.
        table: The table.
        world_size: Number of ranks.
        local_world_size: Number of ranks on each node.

    Returns:
        Names; those that the table itself cannot have are left out.
    """
    sizes = {"world_size": world_size, "local_world_size": local_world_size}
    allowed = constraints.layout_names.get(table.name, tuple(LAYOUTS))
    if table.name in constraints.replicate:
        allowed = tuple({DataParallel.torchrec_name}.intersection(allowed))
    names = [
        name
        for name, kind in LAYOUTS.items()
        if name in allowed and why_not(table, kind(), **sizes) is None
    ]
    ranks = constraints.ranks.get(table.name)
    if ranks is None:
        return names
    return [name for name in names if may_lie_on(LAYOUTS[name](), ranks, **sizes)]


def _check_names(constraints: Constraints, tables: Mapping[str, Table]) -> None:
    mentioned = {
        "layouts": constraints.layouts,
        "ranks": constraints.ranks,
        "colocate": [table for group in constraints.colocate for table in group],
        "replicate": constraints.replicate,
    }
    for where, names in mentioned.items():
        for name in names:
            if name not in tables:
                raise ValueError(
                    f"constraints: {where} names table {name!r}, the model has "
                    f"{some_names(tables, name)}"
                )


def _why_none(
    constraints: Constraints, table: Table, named: Layout | None, sizes: Mapping[str, int]
) -> str | None:
    """What contradicts what, of one table."""
    name = table.name
    allowed = constraints.layout_names.get(name)
    if name in constraints.replicate:
        reason = why_not(table, DataParallel(), **sizes)
        if reason:
            return f"must be replicated, and {reason}"
        if named is not None and not isinstance(named, DataParallel):
            return f"must be replicated, and is named {named}; drop one of the two"
        if allowed is not None and DataParallel.torchrec_name not in allowed:
            return (
                f"must be replicated, and its layouts are only {', '.join(allowed)}; allow "
                "data_parallel or drop it from replicate"
            )
    if named is not None and allowed is not None and named.torchrec_name not in allowed:
        return (
            f"is named {named}, and its layouts are only {', '.join(allowed)}; name one of them "
            "or allow it"
        )
    ranks = constraints.ranks.get(name)
    if named is not None:
        if ranks is not None and not may_lie_on(named, ranks, **sizes):
            return (
                f"is named {named}, and may lie on ranks {sorted(set(ranks))} only, which do not "
                "hold it; allow more ranks or name another layout"
            )
        return None
    if kinds_of(constraints, table, **sizes):
        return None
    ways = (DataParallel.torchrec_name,) if name in constraints.replicate else allowed
    reasons = [why_not(table, LAYOUTS[kind](), **sizes) for kind in ways or LAYOUTS]
    reason = next((text for text in reasons if text), "no such layout lies on those ranks alone")
    return (
        "is left without a layout: it may have "
        f"{', '.join(ways) if ways else 'any'}"
        f"{'' if ranks is None else f' on ranks {sorted(set(ranks))}'}, and {reason}; allow "
        "table_wise"
    )


def _check_group(
    constraints: Constraints,
    group: Sequence[str],
    tables: Mapping[str, Table],
    named: Mapping[str, Layout],
    sizes: Mapping[str, int],
) -> None:
    """Refuses a group whose tables cannot have one layout on the same ranks.

    Raises:
        ValueError: They cannot.
    """
    who = f"tables {', '.join(map(repr, group))} are colocated"
    pinned = {name: named[name] for name in group if name in named}
    _check_pinned(pinned, who)
    kinds = [
        {pinned[name].torchrec_name}
        if name in pinned
        else set(kinds_of(constraints, tables[name], **sizes))
        for name in group
    ]
    both = set.intersection(*kinds)
    if not both:
        raise ValueError(
            f"{who}, and no layout is left to all of them: "
            + "; ".join(
                f"{name!r} may have {', '.join(sorted(of))}"
                for name, of in zip(group, kinds, strict=True)
            )
        )
    placed = [layout for layout in pinned.values() if places_of(layout)]
    layouts = placed[:1] or [LAYOUTS[kind]() for kind in both]
    ranks = common_ranks(constraints, group)
    if ranks is not None and not any(may_lie_on(layout, ranks, **sizes) for layout in layouts):
        raise ValueError(
            f"{who}, and the ranks that all of them may lie on, {list(ranks) or 'none'}, do not "
            f"hold {' or '.join(sorted(map(str, layouts)))}; allow them the same ranks"
        )


def _check_pinned(pinned: Mapping[str, Layout], who: str) -> None:
    """Refuses named layouts of tables that lie together, of two kinds or on other ranks.

    Raises:
        ValueError: They differ.
    """
    kinds = {name: layout.torchrec_name for name, layout in pinned.items()}
    of_both = _first_that_differs(kinds)
    if of_both:
        first, name = of_both
        raise ValueError(
            f"{who}, and {first!r} is named {pinned[first]} but {name!r} {pinned[name]}; name one "
            "layout for both"
        )
    places = {name: places_of(layout) for name, layout in pinned.items() if places_of(layout)}
    of_both = _first_that_differs(places)
    if of_both:
        first, name = of_both
        raise ValueError(
            f"{who}, and {first!r} is pinned to {pinned[first]} but {name!r} to {pinned[name]}; "
            "pin them to the same ranks"
        )


def _first_that_differs(values: Mapping[str, object]) -> tuple[str, str] | None:
    """The first name, and the first whose value is another."""
    first = next(iter(values), "")
    return next(((first, name) for name in values if values[name] != values[first]), None)


def common_ranks(constraints: Constraints, names: Iterable[str]) -> tuple[int, ...] | None:
    """The ranks that may hold each of some tables.

    Args:
        constraints: The constraints.
        names: Of the tables.

    Returns:
        The ranks in order; None if all may.

    Example:
        >>> common_ranks(Constraints(ranks={"a": [0, 2, 1], "b": [3, 1, 2]}), ["a", "b", "c"])
        (1, 2)
    """
    allowed = [set(constraints.ranks[name]) for name in names if name in constraints.ranks]
    return tuple(sorted(set.intersection(*allowed))) if allowed else None
