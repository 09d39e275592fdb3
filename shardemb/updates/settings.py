"""The settings of parameter groups: what a step cannot take, and where ranks differ."""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardemb.optim import SparseOptimizer
from shardemb.updates.faults import Fault

_NO_SETTINGS = {"params", "step"}
_PLAIN = {float, int, bool, str, type(None)}


class Settings:
    """Checks the parameter groups of an optimizer, which a scheduler or a user may change.

    Where nothing changed since the last step, and few things do, it only compares.

    Args:
        declared: The optimizer of each table.
        groups: All parameter groups; those of tables have their name as "table".
    """

    def __init__(
        self, declared: Mapping[str, SparseOptimizer], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        self._declared, self._groups = declared, groups
        self._of_table = {group["table"]: group for group in groups if "table" in group}
        self._held: list[list[Any]] = []
        self._digest = 0
        self.fault: Fault | None = None
        """The first setting that no step can take, if there is one; known after `check`."""

    def check(self) -> None:
        """Refuses groups that hold what a table's optimizer cannot take, the same on all ranks.

        Raises:
            ValueError: One does.
        """
        held = [[*group, *held_by(group, group)] for group in self._groups]
        if held == self._held:
            return
        for name, optimizer in self._declared.items():
            _check_accepts(name, optimizer, self._of_table[name])
        self.fault = _fault_of(self._groups) or self._fault_of_momentum()
        self._digest = zlib.crc32(repr(held).encode())
        self._held = held

    def digest(self, reached: Sequence[str]) -> int:
        """16 bits of what ranks must have the same, by which they find out that they differ.

        So few that a sum of squares over a thousand ranks is exact in float64.

        Args:
            reached: The collections that backward passes reached, in order.
        """
        steps = [group["step"] for group in self._of_table.values()]
        return zlib.crc32(repr((self._digest, steps, reached)).encode()) & 0xFFFF

    def _fault_of_momentum(self) -> Fault | None:
        for name, optimizer in self._declared.items():
            momentum = self._of_table[name].get("momentum")
            if momentum and not optimizer.state:
                return Fault(
                    f"momentum of table {name!r} is {momentum}, and its SGD was declared without, "
                    "so that its rows have no state for it",
                    way_out="declare it with momentum, of which a scheduler may change the value",
                )
        return None


def held_by(group: Mapping[str, Any], names: Iterable[str]) -> list[Any]:
    """Copies of some settings of a group, which do not change when it does."""
    return [
        value if type(value := group[name]) in _PLAIN else _plain(value)
        for name in names
        if name not in _NO_SETTINGS
    ]


def _check_accepts(name: str, optimizer: SparseOptimizer, group: Mapping[str, Any]) -> None:
    """Refuses a table's group that its optimizer cannot take.

    Raises:
        ValueError: It cannot.
    """
    held = {field: _plain(group[field]) for field in vars(optimizer) if field in group}
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


def _plain(value: Any) -> Any:
    """A setting as numbers of Python, which do not change in place: also of tensors and arrays."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _fault_of(groups: Iterable[Mapping[str, Any]]) -> Fault | None:
    """The first number of some parameter groups that is not finite, if there is one."""
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
