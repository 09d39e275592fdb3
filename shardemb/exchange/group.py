"""A process group of torch: shared memory between ranks of one host, gloo between hosts."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardemb.cores import usable_cores
from shardemb.exchange import operators
from shardemb.exchange.neighbours import Member, compiled, find_neighbours, host_id
from shardemb.exchange.several_hosts import Alone, SeveralHosts
from shardemb.exchange.shared import SharedMemory
from shardemb.exchange.tensors import Collectives, Route

BACKEND = "shardemb"
"""What `torch.distributed.new_group(backend=...)` knows it by, after `register`."""
_ProcessGroup: Any = dist.ProcessGroup  # its methods are overloaded in ways that nobody calls


class Done(dist._Work):
    """A collective that was finished when it was called."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout: Any = None) -> bool:  # noqa: ARG002 - torch's
        """It is done."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True

    def is_success(self) -> bool:
        """It was."""
        return True

    def result(self) -> Any:
        """The tensors that it filled."""
        return self._tensors

    def get_future(self) -> torch.futures.Future[Any]:
        """A future that holds the tensors already."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._tensors)
        return future


class ExchangeGroup(_ProcessGroup):  # type: ignore[misc]
    """Runs the collectives of CPU tensors, at once when they are called.

    What it does not do itself, such as send and recv, goes through gloo.

    Args:
        member: This rank.
        host: Equal on ranks that share memory; by default found out.
    """

    def __init__(self, member: Member, host: str | None = None) -> None:
        super().__init__(member.rank, member.size)  # the other constructor refuses subclasses
        kind, cpu = dist.ProcessGroup.BackendType.GLOO, torch.device("cpu")
        self._set_default_backend(kind)
        self._register_backend(cpu, kind, member.gloo)
        self.collectives = _collectives_of(member, host)

    def getBackendName(self) -> str:  # noqa: N802 - torch's
        """By which torch and TorchRec know that it is of the CPU."""
        return "gloo"

    def shutdown(self) -> None:
        """Takes part in nothing more."""
        self.collectives.route.leave()

    def abort(self) -> None:
        """Takes part in nothing more."""
        self.shutdown()

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Done:
        """As torch's, like all that follow."""
        operation = _operation_of(opts)
        for tensor in tensors:
            self._run("all_reduce_", tensor, operation)
        return Done(tensors)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> Done:
        """One after the other."""
        return self.allreduce(tensors, opts)

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], _opts: Any = None
    ) -> Done:
        """One list for each input."""
        for of_ranks, tensor in zip(outputs, inputs, strict=True):
            self._run("allgather_", of_ranks, tensor)
        return Done(outputs)

    def allgather_coalesced(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], _opts: Any = None
    ) -> Done:
        """One list for each rank."""
        self.allgather([list(of_ranks) for of_ranks in zip(*outputs, strict=True)], inputs)
        return Done(outputs)

    def all_gather_single(
        self, output: torch.Tensor, tensor: torch.Tensor, _opts: Any = None
    ) -> Done:
        """Also called `all_gather_into_tensor`."""
        self._run("all_gather_into_tensor", output, tensor)
        return Done([output])

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], _opts: Any = None
    ) -> Done:
        """One after the other."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self._run("all_gather_into_tensor", output, tensor)
        return Done(outputs)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_sizes: Sequence[int] = (),
        input_sizes: Sequence[int] = (),
        _opts: Any = None,
    ) -> Done:
        """One tensor to all ranks."""
        self._run("all_to_all_single", output, tensor, output_sizes, input_sizes)
        return Done([output])

    def alltoall(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], _opts: Any = None
    ) -> Done:
        """One tensor to each rank."""
        self._run("alltoall_", outputs, inputs)
        return Done(outputs)

    def reduce_scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None
    ) -> Done:
        """One list for each output."""
        operation = _operation_of(opts)
        for output, for_ranks in zip(outputs, inputs, strict=True):
            self._run("reduce_scatter_", output, for_ranks, operation)
        return Done(outputs)

    def reduce_scatter_single(
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> Done:
        """Also called `reduce_scatter_tensor`."""
        self._run("reduce_scatter_tensor", output, tensor, _operation_of(opts))
        return Done([output])

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Done:
        """One after the other."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return Done(outputs)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Done:
        """From a rank of the group."""
        for tensor in tensors:
            self._run("broadcast_", tensor, opts.rootRank)
        return Done(tensors)

    def barrier(self, opts: Any = None) -> Done:  # noqa: ARG002 - by which it is called
        """Of all ranks of the group."""
        self.collectives.barrier()
        return Done([])

    # the names of torch 2.11
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    alltoall_base = all_to_all_single
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _run(self, name: str, *arguments: Any) -> None:
        if torch._C._len_torch_dispatch_stack():
            getattr(getattr(torch.ops, operators.LIBRARY), name)(*arguments, self.group_name)
        else:
            getattr(self.collectives, name)(*arguments)


def register(host: str | None = None) -> None:
    """Makes `torch.distributed.new_group(backend=BACKEND)` work.

    Args:
        host: Equal on ranks that share memory; by default found out.
    """
    operators.define()
    dist.Backend.register_backend(
        BACKEND, functools.partial(_new_group, host), extended_api=True, devices=["cpu"]
    )


def _new_group(host: str | None, made: Any, options: Any) -> ExchangeGroup:  # noqa: ARG001
    """What torch calls on each rank of a new group."""
    rank, size = made.group_rank, made.group_size
    gloo = dist.ProcessGroupGloo(made.store, rank, size, timeout=made.timeout)
    ranks = made.global_ranks_in_group or range(size)
    return ExchangeGroup(Member(gloo=gloo, rank=rank, size=size, ranks=ranks), host)


def _collectives_of(member: Member, host: str | None) -> Collectives:
    """Those of a group, when its ranks have found who shares a host. On all ranks together."""
    near = True
    route: Route = Alone()
    if member.size > 1:
        near, route = _meet(member, host or host_id())
    return Collectives(route, member.gloo, rank=member.rank, size=member.size, near=near)


def _meet(member: Member, host: str) -> tuple[bool, Route]:
    code = compiled()
    hosts, neighbours = find_neighbours(member, code, host)
    near = [rank for rank, number in enumerate(hosts) if number == hosts[member.rank]]
    memory = None
    if neighbours:
        assert code is not None
        memory = SharedMemory(
            code,
            neighbours,
            ranks=[member.ranks[rank] for rank in near],
            me=near.index(member.rank),
            num_cores=usable_cores(),
            timeout=lambda: member.gloo.options._timeout,
        )
        if len(near) == member.size:
            return True, memory
    return False, SeveralHosts(code, member, near, memory)


def _operation_of(opts: Any) -> int:
    return 0 if opts is None else int(opts.reduceOp.op)
