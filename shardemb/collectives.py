"""Counts the bytes that a rank really hands to its collectives. Predicts nothing: see traffic.py.

What a collective moves depends on its algorithm. What is counted here is the least that must leave
the rank, as in the bus bandwidth of nccl-tests (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md):

- all_to_all, scatter: what is addressed to other ranks;
- reduce_scatter: the parts of its input that are for other ranks, (W - 1) / W where all are equal;
- all_gather: W - 1 times its input;
- all_reduce: 2 (W - 1) / W times its tensor;
- broadcast: W - 1 times its tensor, at the root;
- reduce, gather: its tensor, but nothing at the root;
- send: its tensor.
"""

# W ranks of a process group

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from shardemb.errors import RunError
from shardemb.text import format_table

Arguments = Mapping[str, Any]
"""What an operator was called with, by the names of its schema."""
_INPUTS = (
    *("input_tensor", "input_tensors", "input_list", "input", "inputs"),
    *("tensors", "tensor", "shard"),
)
_SEND_NOTHING = {
    *("barrier", "monitored_barrier_", "recv_", "recv_any_source_", "irecv", "wait_tensor"),
    *("_wrap_tensor_autograd", "check_for_nan"),
    *("_split_1d_cat_2d", "_split_1d_cat_2d_backward_impl"),
}
_LIBRARIES = {
    *("c10d", "_c10d_functional", "_c10d_functional_autograd", "torchrec"),
    "shardemb_exchange",
}


@dataclass(kw_only=True)
class CollectiveCount:
    """What the collectives of one kind and one size of process group have moved.

    Attributes:
        num_calls: How often they were called.
        sent_bytes: Bytes that had to leave the rank.
        kept_bytes: Bytes of their inputs that were addressed to the rank itself.
        buffer_bytes: Bytes of all tensors that they read and filled.
    """

    num_calls: int = 0
    sent_bytes: float = 0.0
    kept_bytes: float = 0.0
    buffer_bytes: int = 0


class CollectiveCounter(TorchDispatchMode):
    """A context that counts what this rank hands to its collectives, forward and backward.

    It sees every collective that this thread starts, those of the backward passes that it starts,
    of `DistributedDataParallel` and of TorchRec among them. While it is open every torch operation
    takes some microseconds more.

    Attributes:
        counts: By kind of collective and number of ranks of its process group.

    Example:
        >>> import shardemb as se
        >>> env = se.init_distributed(device="cpu")
        >>> with CollectiveCounter() as counter:
        ...     torch.distributed.all_reduce(torch.ones(256))
        >>> print(counter)
        collective  ranks  calls  bytes sent
        all_reduce      1      1           0
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[tuple[str, int], CollectiveCount] = {}

    @property
    def sent_bytes(self) -> float:
        """Bytes that had to leave the rank, in all."""
        return sum(count.sent_bytes for count in self.counts.values())

    def __str__(self) -> str:
        rows = [
            (kind, str(size), f"{count.num_calls:,}", f"{count.sent_bytes:,.0f}")
            for (kind, size), count in sorted(self.counts.items())
        ]
        return format_table(("collective", "ranks", "calls", "bytes sent"), rows, right=(1, 2, 3))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What torch calls in place of every operator.

        Raises:
            RunError: It is not known what the operator sends.
        """
        result = func(*args, **(kwargs or {}))
        library, _, name = func._schema.name.partition("::")
        if library not in _LIBRARIES or name in _SEND_NOTHING:
            return result
        if name not in _RULES:
            raise RunError(f"CollectiveCounter does not know what {library}::{name} sends")
        arguments = [argument.name for argument in func._schema.arguments]
        given = dict(zip(arguments, args, strict=False)) | dict(kwargs or {})
        self._add(name, given, [given, result])
        return result

    def _add(self, name: str, given: Arguments, buffers: list[Any]) -> None:
        group = _group_of(given)
        kind, rule = _RULES[name]
        sent_bytes, kept_bytes = rule(given, group)
        count = self.counts.setdefault((kind, group.size()), CollectiveCount())
        count.num_calls += 1
        count.sent_bytes += sent_bytes
        count.kept_bytes += kept_bytes
        count.buffer_bytes += sum(
            {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(buffers)}.values()
        )


def _group_of(given: Arguments) -> dist.ProcessGroup:
    group = given["process_group"] if "process_group" in given else given["group_name"]
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _tensors(of: Any) -> Iterable[torch.Tensor]:
    """The tensors in lists and mappings of such."""
    if isinstance(of, torch.Tensor):
        yield of
    elif isinstance(of, (list, tuple, dict)):
        for item in of.values() if isinstance(of, dict) else of:
            yield from _tensors(item)


def _input_of(given: Arguments) -> Any:
    return next(given[name] for name in _INPUTS if name in given)


def _input_bytes(given: Arguments) -> int:
    return sum(tensor.nbytes for tensor in _tensors(_input_of(given)))


def _is_root(given: Arguments, group: dist.ProcessGroup) -> bool:
    root: int = given["root_rank"] if "root_rank" in given else given["src"]
    return root == group.rank()


# What a rank sends and what it keeps of its input, in bytes


def _of_split(given: Arguments, group: dist.ProcessGroup) -> tuple[float, float]:
    """One tensor, split between all ranks as given, or evenly."""
    total, splits = _input_bytes(given), given.get("input_split_sizes") or [1] * group.size()
    kept = total * splits[group.rank()] / max(1, sum(splits))
    return total - kept, kept


def _of_listed(given: Arguments, group: dist.ProcessGroup) -> tuple[float, float]:
    """One tensor for each rank; none at all where only the root has some."""
    listed = list(_tensors(_input_of(given)))
    kept = listed[group.rank()].nbytes if listed else 0
    return _input_bytes(given) - kept, kept


def _of_all_gather(given: Arguments, group: dist.ProcessGroup) -> tuple[float, float]:
    return (group.size() - 1) * _input_bytes(given), _input_bytes(given)


def _of_all_reduce(given: Arguments, group: dist.ProcessGroup) -> tuple[float, float]:
    return 2 * (group.size() - 1) * _input_bytes(given) / group.size(), 0


def _of_broadcast(given: Arguments, group: dist.ProcessGroup) -> tuple[float, float]:
    return (group.size() - 1) * _input_bytes(given) * _is_root(given, group), 0


def _of_reduce(given: Arguments, group: dist.ProcessGroup) -> tuple[float, float]:
    return _input_bytes(given) * (not _is_root(given, group)), 0


def _of_send(given: Arguments, group: dist.ProcessGroup) -> tuple[float, float]:  # noqa: ARG001
    return _input_bytes(given), 0


_Rule = Callable[[Arguments, dist.ProcessGroup], tuple[float, float]]
# By the operators of torch and TorchRec: those of c10d, then those of _c10d_functional and torchrec
_RULES: dict[str, tuple[str, _Rule]] = {
    name: (kind, rule)
    for kind, rule, names in (
        ("all_to_all", _of_listed, "alltoall_"),
        ("all_to_all", _of_split, "alltoall_base_ all_to_all_single"),
        ("reduce_scatter", _of_listed, "reduce_scatter_"),
        (
            "reduce_scatter",
            _of_split,
            "_reduce_scatter_base_ reduce_scatter_tensor_coalesced_ reduce_scatter_tensor "
            "reduce_scatter_tensor_out reduce_scatter_tensor_coalesced",
        ),
        (
            "all_gather",
            _of_all_gather,
            "allgather_ _allgather_base_ allgather_coalesced_ allgather_into_tensor_coalesced_ "
            "all_gather_into_tensor all_gather_into_tensor_out all_gather_into_tensor_coalesced",
        ),
        (
            "all_reduce",
            _of_all_reduce,
            "allreduce_ allreduce_coalesced_ all_reduce all_reduce_ all_reduce_coalesced "
            "all_reduce_coalesced_",
        ),
        ("broadcast", _of_broadcast, "broadcast_ broadcast"),
        ("scatter", _of_listed, "scatter_"),
        ("reduce", _of_reduce, "reduce_"),
        ("gather", _of_reduce, "gather_"),
        ("send", _of_send, "send isend"),
    )
    for name in names.split()
}
