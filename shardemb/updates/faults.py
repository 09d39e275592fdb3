"""What a step cannot take: what it is called, and how all ranks learn of it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


def raise_first(faults: Sequence[Fault | None], *, where: str, rest: str) -> None:
    """Raises the first fault of all ranks on all of them, if there is one. On all ranks together.

    Args:
        faults: Of this rank, those that say most first; as many on every rank.
        where: In what they were found: "step 3".
        rest: What became of it.

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
    by = "" if sample is None else f", looked up by sample {sample[1]} of rank {sample[0]}"
    raise RunError(f"{where}: {what}{by}; {rest}; {found[0].way_out}")
