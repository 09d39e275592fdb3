"""The settings of parameter groups: what a step cannot take, and where ranks differ."""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardemb.optim import SparseOptimizer
from shardemb.updates.faults import Fault


class TableSettings:
    """Checks the parameter groups of tables, which a scheduler or a user may change.

    Args:
        declared: The optimizer of each table.
        groups: The group of each.
    """

    def __init__(
        self, declared: Mapping[str, SparseOptimizer], groups: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._declared, self._groups = declared, groups
        self._accepted: dict[str, dict[str, Any]] = {}

    def check(self) -> None:
        """Refuses groups that hold what a table's optimizer cannot take, the same on all ranks.

        Raises:
            ValueError: One does.
        """
        for name, optimizer in self._declared.items():
            held = {
                field: _plain(self._groups[name][field])
                for field in vars(optimizer)
                if field in self._groups[name]
            }
            if held == self._accepted.get(name):
                continue
            # numbers that are not finite are found on any rank alone; a schedule may end at lr 0
            usual = {field: value for field, value in held.items() if is_finite(value)}
            usual["lr"] = usual.get("lr") or optimizer.lr
            try:
                missing = sorted(set(vars(optimizer)) - set(held))
                if missing:
                    raise ValueError(f"{type(optimizer).__name__}: {missing[0]} is missing")
                type(optimizer)(**vars(optimizer) | usual)
            except (TypeError, ValueError) as error:
                raise ValueError(f"the parameter group of table {name!r}: {error}") from error
            self._accepted[name] = held

    def fault(self) -> Fault | None:
        """The first setting that a table has no state for, if there is one."""
        for name, optimizer in self._declared.items():
            momentum = self._groups[name].get("momentum")
            if momentum and not optimizer.state:
                return Fault(
                    f"momentum of table {name!r} is {momentum}, and its SGD was declared without, "
                    "so that its rows have no state for it",
                    way_out="declare it with momentum, of which a scheduler may change the value",
                )
        return None


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def fault_of_settings(groups: Iterable[Mapping[str, Any]]) -> Fault | None:
    """The first number of some parameter groups that is not finite, if there is one.

    Args:
        groups: Of an optimizer; those of tables have their name as "table".

    Example:
        >>> fault_of_settings([{"params": [], "table": "user", "lr": float("nan")}]).what
        "lr of table 'user' is nan"
    """
    for group in groups:
        for name, value in settings_of(group).items():
            if not is_finite(value):
                return Fault(f"{name} of {_owner(group)} is {value}")
    return None


def is_finite(value: Any) -> bool:
    """Whether a setting is finite, if it is a number or some."""
    if isinstance(value, (tuple, list)):
        return all(is_finite(one) for one in value)
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    return not isinstance(value, float) or math.isfinite(value)


def digest_of(groups: Iterable[Mapping[str, Any]], reached: Sequence[str]) -> int:
    """16 bits of what ranks must have the same, by which they find out that they differ.

    So few that a sum of squares over a thousand ranks is exact in float64.
    """
    said = [reached, *(settings_of(group) for group in groups)]
    return zlib.crc32(repr(said).encode()) & 0xFFFF


def fault_of_difference(
    groups: Iterable[Mapping[str, Any]], reached: Sequence[str]
) -> Fault | None:
    """The first thing that ranks should have the same and have not. On all ranks together.

    Args:
        groups: Of the optimizer: their settings should be.
        reached: The collections that backward passes reached, in order.
    """
    mine = [settings_of(group) for group in groups], list(reached)
    of_ranks = [mine] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(of_ranks, mine)
    for rank, (_, its_order) in enumerate(of_ranks):
        if its_order != of_ranks[0][1]:
            return Fault(
                f"the losses of rank 0 and rank {rank} have gradients of collections "
                f"{of_ranks[0][1]} and {its_order}, in that order, so that their exchanges met "
                "each other's",
                way_out="use the same collections in the same order in the loss of every rank",
            )
    for rank, (theirs, _) in enumerate(of_ranks):
        for first, other in zip(of_ranks[0][0], theirs, strict=True):
            for name, value in first.items():
                if repr(other.get(name)) != repr(value):
                    return Fault(
                        f"{name} of {_owner(first)} is {value} on rank 0 and {other.get(name)} on "
                        f"rank {rank}",
                        way_out="set it the same on every rank",
                    )
    return None


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter group holds beside its parameters."""
    return {name: value for name, value in group.items() if name != "params"}


def _owner(group: Mapping[str, Any]) -> str:
    table = group.get("table")
    return "the dense parameters" if table is None else f"table {table!r}"
