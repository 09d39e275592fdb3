"""Who chose a layout and why, in a few words: what the column "chosen by" of a plan says."""

from collections.abc import Iterator

from shardemb.planning.candidates import Candidate
from shardemb.planning.geometry import placed
from shardemb.planning.problem import Problem
from shardemb.planning.search import Item, Place
from shardemb.text import format_bytes

_MOST_CHARACTERS = 60


def chosen_by(problem: Problem, item: Item, place: Place, position: int) -> str:
    """Who chose the layout of one of an item's tables, and why.

    Args:
        problem: What was to be planned.
        item: The table, or tables that lie together.
        place: What it has.
        position: Of the table in the item.

    Returns:
        At most 60 characters where the planner chose: the milliseconds of a step on each rank that
        holds the table, how many these are, the part of it that is lookup, and the same of the
        layout that would have been next.
    """
    name, candidate = item.names[position], place.candidate
    layout = candidate.layouts[position]
    together = len(item.names) > 1
    if name in problem.named:
        if placed(layout, place.places) == layout:
            return "named"
        return f"named, ranks by planner{' for all colocated' if together else ''}"
    constraints = problem.constraints
    if name in constraints.replicate:
        return "replicated: constraint"
    limited = together or name in constraints.layouts or name in constraints.ranks
    who = "planner, constrained" if limited else "planner"
    reasons = list(_reasons(problem, item, candidate, position))
    texts = [f"{who}: {reason}" for reason in reasons]
    return next((text for text in texts if len(text) <= _MOST_CHARACTERS), texts[-1])


def _reasons(problem: Problem, item: Item, candidate: Candidate, position: int) -> Iterator[str]:
    """The same in fewer words each time."""
    lookup_ms = candidate.costs[position].lookup_ms
    own = f"{_ms(sum(candidate.costs[position]))} ms{_on(candidate)}"
    instead = _instead(problem, item, candidate, position)
    yield f"{own} ({_ms(lookup_ms)} lookup){instead}"
    yield f"{own}{instead}"
    yield own


def _instead(problem: Problem, item: Item, candidate: Candidate, position: int) -> str:
    """What the layout of the least work but the chosen one would cost, if there is one."""
    others = [one for one in item.candidates if one.kind != candidate.kind]
    if not others:
        return ""
    other = min(others, key=lambda one: one.ms * one.num_ranks)
    if other.num_bytes > problem.bytes_per_rank:
        return f"; {other.kind} needs {format_bytes(other.num_bytes)}"
    return f"; {other.kind} {_ms(sum(other.costs[position]))}{_on(other)}"


def _on(candidate: Candidate) -> str:
    return f" x {candidate.num_ranks} ranks" if candidate.num_ranks > 1 else ""


def _ms(ms: float) -> str:
    """Milliseconds in few characters.

    Example:
        >>> _ms(123.4), _ms(0.347), _ms(0.00257), _ms(0.0001)
        ('123', '0.35', '0.003', '<0.001')
    """
    if ms >= 10:
        return f"{ms:.0f}"
    if ms >= 0.01:
        return f"{ms:.2f}"
    return f"{ms:.3f}" if ms >= 0.0005 or ms == 0 else "<0.001"
