"""Collectives of CPU tensors, as bytes that go from rank to rank. Knows no processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist

from shardemb.exchange import calls

_WHOLE_BYTES = 1 << 15  # up to here each rank sums all; above, each sums a part and shares it
_OPERATIONS = [getattr(dist.ReduceOp, name.upper()) for name in calls.OPERATIONS]
_SUM, _AVG, _PRODUCT, _MIN, _MAX = range(5)
_OF_TRUTHS = {_SUM: _MAX, _PRODUCT: _MIN}


class Route(Protocol):
    """What carries bytes: see shared.py and several_hosts.py."""

    def run(
        self,
        call: int,
        item_bytes: int,
        parts: calls.Parts,
        *,
        shared: bool = False,
        total: tuple[int, int, int] = (-1, 0, 0),
    ) -> None:
        """Sends each rank its part, and takes or sums what they send."""

    def leave(self) -> None:
        """Takes part in nothing more."""


class Collectives:
    """The collectives of a group; all return when this rank's part is done.

    Args:
        route: Carries the bytes.
        gloo: Torch's `ProcessGroupGloo`, which does what the route does not.
        rank: Of this process in the group.
        size: Number of ranks.
        near: Whether all ranks are on one host.
    """

    def __init__(self, route: Route, gloo: Any, *, rank: int, size: int, near: bool) -> None:
        self.route = route
        self._gloo, self._rank, self._size, self._near = gloo, rank, size, near
        self._none = [0] * size

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
    ) -> None:
        """One tensor to all ranks, split by its first dimension as given, or evenly."""
        send = _dense(input)
        with _room(output) as receive:
            parts = (
                *self._split(send, input_split_sizes),
                *self._split(receive, output_split_sizes),
            )
            self.route.run(calls.ALL_TO_ALL, send.element_size(), parts)

    def alltoall_(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """One tensor to each rank."""
        send = [_dense(tensor) for tensor in inputs]
        with _rooms(outputs) as receive:
            parts = (*_listed(send), *_listed(receive))
            self.route.run(calls.ALL_TO_ALL, send[0].element_size(), parts)

    def allgather_(self, outputs: Sequence[torch.Tensor], input: torch.Tensor) -> None:
        """Each rank's tensor to all; they may differ in size."""
        send = _dense(input)
        with _rooms(outputs) as receive:
            self._share(calls.ALL_GATHER, send, *_listed(receive))

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Each rank's tensor to all, one after the other."""
        send = _dense(input)
        with _room(output) as receive:
            if not self._near:
                self._gloo._allgather_base(receive, send).wait()
                return
            self._share(calls.ALL_GATHER, send, *self._split(receive.view(-1), ()))

    def all_reduce_(self, tensor: torch.Tensor, reduce_op: int) -> None:
        """The sum, or another reduction, of all ranks' tensors; the same bits on all."""
        if tensor.layout != torch.strided or not self._near:
            self._all_reduce_by_gloo(tensor, reduce_op)
            return
        dtype, operation = _kind_of_numbers(tensor.dtype, reduce_op)
        with _room(tensor, filled=True) as both:
            if both.nbytes <= _WHOLE_BYTES or self._size == 1:
                call = calls.reduction(calls.ALL_REDUCE, operation, dtype)
                place, num_bytes = both.data_ptr(), both.nbytes
                self.route.run(
                    call,
                    both.element_size(),
                    self._same(place, num_bytes),
                    shared=True,
                    total=(dtype, operation, place),
                )
            else:
                self._reduce_in_parts(both.view(-1), dtype, operation)

    def reduce_scatter_(
        self, output: torch.Tensor, inputs: Sequence[torch.Tensor], reduce_op: int
    ) -> None:
        """The sum of what all ranks have for this one."""
        send = [_dense(tensor) for tensor in inputs]
        self._reduce_scatter(output, send[0], _listed(send), reduce_op)

    def reduce_scatter_tensor(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        reduce_op: int,
    ) -> None:
        """The sum of what all ranks have for this one, in one tensor split evenly."""
        send = _dense(input)
        self._reduce_scatter(output, send, self._split(send.view(-1), ()), reduce_op)

    def broadcast_(self, tensor: torch.Tensor, root_rank: int) -> None:
        """The root's tensor to all."""
        if not self._near:
            options = dist.BroadcastOptions()
            options.rootRank = root_rank
            self._gloo.broadcast([tensor], options).wait()
            return
        is_root = root_rank == self._rank
        with _room(tensor, filled=is_root) as both:
            place, num_bytes = both.data_ptr(), both.nbytes
            awaited = list(self._none)
            awaited[root_rank] = num_bytes
            sent = [num_bytes] * self._size if is_root else self._none
            parts = ([place] * self._size, sent, [place] * self._size, awaited)
            call = calls.from_root(calls.BROADCAST, root_rank)
            self.route.run(call, both.element_size(), parts, shared=True)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if not self._near:
            self._gloo.barrier().wait()
            return
        none = self._none
        self.route.run(calls.BARRIER, 1, (none, none, none, none), shared=True)

    def _share(
        self, call: int, send: torch.Tensor, to: Sequence[int], awaited: Sequence[int]
    ) -> None:
        starts, sent = [send.data_ptr()] * self._size, [send.nbytes] * self._size
        parts = (starts, sent, to, awaited)
        self.route.run(call, send.element_size(), parts, shared=self._near)

    def _same(
        self, place: int, num_bytes: int
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        places, nums = [place] * self._size, [num_bytes] * self._size
        return places, nums, places, nums

    def _reduce_in_parts(self, both_N: torch.Tensor, dtype: int, operation: int) -> None:
        """Each rank sums a part, which it then shares."""
        item_bytes = both_N.element_size()
        each, more = divmod(len(both_N), self._size)
        nums = [(each + (rank < more)) * item_bytes for rank in range(self._size)]
        places = list(accumulate(nums[:-1], initial=both_N.data_ptr()))
        place, num_bytes = places[self._rank], nums[self._rank]
        call = calls.reduction(calls.ALL_REDUCE, operation, dtype, in_parts=True)
        parts = (places, nums, [place] * self._size, [num_bytes] * self._size)
        self.route.run(call, item_bytes, parts, total=(dtype, operation, place))
        parts = ([place] * self._size, [num_bytes] * self._size, places, nums)
        self.route.run(calls.ALL_GATHER, item_bytes, parts, shared=True)

    def _reduce_scatter(
        self,
        output: torch.Tensor,
        first: torch.Tensor,
        send: tuple[list[int], list[int]],
        reduce_op: int,
    ) -> None:
        dtype, operation = _kind_of_numbers(first.dtype, reduce_op)
        with _room(output) as total:
            place = total.data_ptr()
            parts = (*send, [place] * self._size, [total.nbytes] * self._size)
            call = calls.reduction(calls.REDUCE_SCATTER, operation, dtype)
            self.route.run(call, first.element_size(), parts, total=(dtype, operation, place))

    def _all_reduce_by_gloo(self, tensor: torch.Tensor, reduce_op: int) -> None:
        is_mean = reduce_op == _AVG and tensor.is_floating_point()
        options = dist.AllreduceOptions()
        options.reduceOp = _OPERATIONS[_SUM if is_mean else reduce_op]
        self._gloo.allreduce([tensor], options).wait()
        if is_mean:
            tensor.div_(self._size)

    def _split(self, tensor: torch.Tensor, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Where the parts of a tensor begin, and their bytes.

        Raises:
            ValueError: It cannot be split so.
        """
        num_rows, size = tensor.size(0) if tensor.dim() else 1, self._size
        if not sizes:
            if num_rows % size:
                raise ValueError(
                    f"a first dimension of {num_rows} cannot be split evenly between {size} ranks; "
                    "give the sizes of the parts"
                )
            nums = [tensor.nbytes // size] * size
        else:
            if len(sizes) != size or sum(sizes) != num_rows or min(sizes) < 0:
                raise ValueError(
                    f"the parts {list(sizes)} do not fit a first dimension of {num_rows} and "
                    f"{size} ranks; give each rank a part, of all the rows together"
                )
            row_bytes = tensor.nbytes // num_rows if num_rows else 0
            nums = [number * row_bytes for number in sizes]
        return list(accumulate(nums[:-1], initial=tensor.data_ptr())), nums


def _kind_of_numbers(dtype: torch.dtype, reduce_op: int) -> tuple[int, int]:
    """The dtype and operation as exchange.c knows them.

    Raises:
        ValueError: It cannot do this.
    """
    if dtype == torch.bool:
        dtype, reduce_op = torch.uint8, _OF_TRUTHS.get(reduce_op, reduce_op)
        refused = reduce_op == _AVG
    elif dtype.is_floating_point:
        refused = reduce_op > _MAX
    else:
        refused = reduce_op == _AVG
    if refused or reduce_op >= len(_OPERATIONS) or dtype not in calls.TYPE_OF:
        operation = calls.OPERATIONS[reduce_op] if reduce_op < len(_OPERATIONS) else reduce_op
        raise ValueError(f"tensors of {dtype} cannot be reduced by {operation}")
    return calls.TYPE_OF[dtype], reduce_op


def _listed(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    return [tensor.data_ptr() for tensor in tensors], [tensor.nbytes for tensor in tensors]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its values one after the other.

    Raises:
        ValueError: It is not on the CPU.
    """
    if not tensor.is_cpu:
        raise ValueError(f"this process group takes CPU tensors, got one on {tensor.device}")
    return tensor.contiguous()


@contextmanager
def _room(output: torch.Tensor, *, filled: bool = False) -> Iterator[torch.Tensor]:
    """A dense tensor whose values the output has afterwards; it has the output's before."""
    dense = (
        _dense(output)
        if filled or output.is_contiguous()
        else torch.empty_like(output, memory_format=torch.contiguous_format)
    )
    yield dense
    if dense is not output:
        output.copy_(dense)


@contextmanager
def _rooms(outputs: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    dense = [_dense(output) for output in outputs]
    yield dense
    for output, values in zip(outputs, dense, strict=True):
        if values is not output:
            output.copy_(values)
