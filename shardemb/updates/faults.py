"""Values that are not finite: what they are called, and how all ranks learn of one."""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from shardemb.errors import RunError

WAY_OUT = "lower the learning rates, clip by max_norm, or look for such values in the data"
"""What to do about values that are not finite."""


class Fault(NamedTuple):
    """A value that is not finite, or that a step cannot take.

    Attributes:
        what: What it is, and where: "row 3 of table 'user' is nan, on rank 1".
        sample: Whose sample looked it up, if that is known: a rank, and the number in its batch.
        way_out: What to do about it.
    """

    what: str
    sample: tuple[int, int] | None = None
    way_out: str = WAY_OUT


def fault_of_settings(groups: Iterable[Mapping[str, Any]]) -> Fault | None:
    """The first number of some parameter groups that is not finite, if there is one.

    Args:
        groups: Of an optimizer; those of tables have their name as "table".

    Example:
        >>> fault_of_settings([{"params": [], "table": "user", "lr": float("nan")}]).what
        "lr of table 'user' is nan"
    """
    for group in groups:
        for name, value in _settings_of(group).items():
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
    said = [reached, *(_settings_of(group) for group in groups)]
    return zlib.crc32(repr(said).encode()) & 0xFFFF


def fault_of_difference(
    groups: Iterable[Mapping[str, Any]], reached: Sequence[str]
) -> Fault | None:
    """The first thing that ranks should have the same and have not. On all ranks together.

    Args:
        groups: Of the optimizer: their settings should be.
        reached: The collections that backward passes reached, in order.
    """
    mine = [_settings_of(group) for group in groups], list(reached)
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


def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _owner(group: Mapping[str, Any]) -> str:
    table = group.get("table")
    return "the dense parameters" if table is None else f"table {table!r}"


def largest_of(values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The largest absolute values of some tensors, not finite where any is not; float32 scalars."""
    filled = [value for value in values.values() if value.numel()]
    if not filled:
        return []
    return [norm.float() for norm in torch._foreach_norm(filled, float("inf"))]


def fault_of(what: str, values: Mapping[str, torch.Tensor]) -> Fault | None:
    """The first value of some dense tensors that is not finite, if there is one.

    Args:
        what: What they are, with "{}" for the name.
        values: By name.

    Example:
        >>> fault_of("parameter {}", {"bias": torch.tensor([1.0, float("inf")])}).what
        "parameter 'bias' is inf"
    """
    for name, value in values.items():
        bad = value[~torch.isfinite(value)]
        if len(bad):
            return Fault(f"{what.format(repr(name))} is {float(bad[0])}")
    return None


def raise_first(faults: Sequence[Fault | None], *, step: int, rest: str) -> None:
    """Raises the first fault of all ranks on all of them, if there is one. On all ranks together.

    Args:
        faults: Of this rank, those that say most first; as many on every rank.
        step: Number of the step.
        rest: What became of the step.

    Raises:
        RunError: There is a fault on any rank.
    """
    of_ranks: list[Sequence[Fault | None]] = [faults] * dist.get_world_size()
    if dist.get_world_size() > 1:
        dist.all_gather_object(of_ranks, faults)
    found = [one for kind in zip(*of_ranks, strict=True) for one in kind if one is not None]
    if not found:
        return
    what = found[0].what
    samples = (one.sample for one in found if one.what == what)  # replicas know of their own
    sample = next((one for one in samples if one is not None), None)
    where = "" if sample is None else f", looked up by sample {sample[1]} of rank {sample[0]}"
    raise RunError(f"step {step}: {what}{where}; {rest}; {found[0].way_out}")
