"""Values that are not finite: what they are called, and how all ranks learn of one."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from shardemb.errors import RunError

WAY_OUT = "lower the learning rates, clip by max_norm, or look for such values in the data"
"""What to do about values that are not finite."""


class Fault(NamedTuple):
    """A value that is not finite.

    Attributes:
        what: What it is, and where: "row 3 of table 'user' is nan, on rank 1".
        sample: Whose sample looked it up, if that is known: a rank, and the number in its batch.
    """

    what: str
    sample: tuple[int, int] | None = None


def fault_of_settings(groups: Iterable[Mapping[str, Any]]) -> Fault | None:
    """The first number of some parameter groups that is not finite, if there is one.

    Args:
        groups: Of an optimizer; those of tables have their name as "table".

    Example:
        >>> fault_of_settings([{"params": [], "table": "user", "lr": float("nan")}])
        Fault(what="lr of table 'user' is nan", sample=None)
    """
    for group in groups:
        for name, value in group.items():
            if name == "params":
                continue
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            for number in numbers:
                if not _is_finite(number):
                    table = group.get("table")
                    where = "the dense parameters" if table is None else f"table {table!r}"
                    return Fault(f"{name} of {where} is {value}")
    return None


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    return not isinstance(value, float) or math.isfinite(value)


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
        >>> fault_of("parameter {}", {"bias": torch.tensor([1.0, float("inf")])})
        Fault(what="parameter 'bias' is inf", sample=None)
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
    raise RunError(f"step {step}: {what}{where}; {rest}; {WAY_OUT}")
