"""The exchange between ranks: through shared memory on one host, through gloo between hosts."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from shardemb.exchange.group import BACKEND, register
from shardemb.exchange.neighbours import compiled

_made: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup | None] = WeakKeyDictionary()
"""By what was WORLD then; None where WORLD itself serves."""


def exchange_group(device: torch.device, *, host: str | None = None) -> dist.ProcessGroup:
    """The process group by which all ranks exchange tensors. On all ranks together.

    It is made at the first call, and goes with the process group that is there.

    Args:
        device: Of the tensors.
        host: Equal on ranks that share memory; by default found out. Counts at the first call, for
            all groups that follow.

    Returns:
        Our own group on the CPU; WORLD for other devices, for one rank, or where any rank has none
        of the compiled code.

    Example:
        >>> import shardemb as se
        >>> env = se.init_distributed(device="cpu")
        >>> exchange_group(env.device).size()
        1
    """
    world = dist.group.WORLD
    assert world is not None
    if device.type != "cpu" or world.size() == 1:
        return world
    if world not in _made:
        _made[world] = _new_group(world, device, host)
    return _made[world] or world


def group_of(ranks: Sequence[int], device: torch.device) -> dist.ProcessGroup:
    """A group of some ranks, of the kind that `exchange_group` gives. On all ranks together.

    Args:
        ranks: Of the group, ascending.
        device: Of the tensors.

    Returns:
        A new group, or that of all ranks; ranks that are not in it get what torch gives those.
    """
    whole, world = exchange_group(device), dist.group.WORLD
    assert world is not None
    if len(ranks) == world.size():
        return whole
    group: dist.ProcessGroup = dist.new_group(
        list(ranks),
        timeout=world._get_backend(device).options._timeout,
        backend=None if whole is world else BACKEND,
    )
    return group


def _new_group(
    world: dist.ProcessGroup, device: torch.device, host: str | None
) -> dist.ProcessGroup | None:
    has_code = torch.tensor(compiled() is not None, dtype=torch.uint8)
    dist.all_reduce(has_code, op=dist.ReduceOp.MIN)
    if not has_code:
        return None
    register(host)
    group: dist.ProcessGroup = dist.new_group(
        timeout=world._get_backend(device).options._timeout,
        backend=BACKEND,
    )
    return group
