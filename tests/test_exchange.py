"""The collectives of our own process group, beside those of gloo and sums in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardemb as se
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.exchange import exchange_group
from shardemb.exchange.group import ExchangeGroup
from shardemb.exchange.shared import SharedMemory
from tests.moved_tensors import (
    LARGE,
    check_equal,
    check_moves,
    check_scattered_sums,
    check_sums,
    even_splits,
)
from tests.spmd import spmd


def both_of(env: Env) -> tuple[ExchangeGroup, dist.ProcessGroup]:
    """Our group, through memory, and gloo."""
    ours, world = exchange_group(env.device), dist.group.WORLD
    assert isinstance(ours, ExchangeGroup)
    assert isinstance(ours.collectives.route, SharedMemory)
    assert world is not None
    return ours, world


@spmd(world_size=2)
def test_collectives_of_two_ranks_are_those_of_gloo(env: Env) -> None:
    group, _ = both_of(env)
    check_moves(env, group)
    check_sums(env, group)
    check_scattered_sums(env, group)


@spmd(world_size=3)
def test_collectives_of_three_ranks_are_those_of_gloo(env: Env) -> None:
    group, _ = both_of(env)
    check_moves(env, group)
    check_sums(env, group)
    check_scattered_sums(env, group)


@spmd(world_size=4)
def test_collectives_of_four_ranks_and_of_some_of_them(env: Env) -> None:
    group, _ = both_of(env)
    check_moves(env, group)
    check_scattered_sums(env, group)
    of_ranks: list[object] = [None] * 4
    dist.all_gather_object(of_ranks, {"rank": env.rank}, group=group)
    assert of_ranks == [{"rank": rank} for rank in range(4)]
    pair = [1, 3] if env.rank % 2 else [0, 2]
    for ranks in ([0, 2], [1, 3]):
        made = dist.new_group(ranks, backend="shardemb")
        if env.rank in ranks:
            total = torch.tensor([env.rank])
            dist.all_reduce(total, group=made)
            assert total.tolist() == [sum(pair)]
            dist.broadcast(total, src=pair[1], group=made)
            if env.rank == pair[0]:
                dist.send(total + 1, dst=pair[1], group=made)
            else:
                dist.recv(total, src=pair[0], group=made)
                assert total.tolist() == [sum(pair) + 1]


@spmd(world_size=2)
def test_torch_s_other_callers_get_what_gloo_gives_and_are_counted_alike(env: Env) -> None:
    ours, world = both_of(env)

    def call(group: dist.ProcessGroup) -> list[torch.Tensor]:
        rows = torch.rand(4, 2)
        found = [
            functional.all_reduce(rows, "sum", group),
            functional.all_gather_tensor(rows, 0, group),
            functional.reduce_scatter_tensor(rows, "sum", 0, group),
            functional.all_to_all_single(rows, None, None, group),
        ]
        return [functional.wait_tensor(tensor) for tensor in found] + trained(group)

    check_equal(env, ours, call)
    counts = []
    for group in (ours, world):
        with se.CollectiveCounter() as counter:
            call(group)
            even_splits(group)
            dist.reduce_scatter(torch.empty(1), [torch.ones(1)] * 2, group=group)
            dist.broadcast(torch.ones(3), src=1, group=group)
        counts.append({key: vars(count) for key, count in counter.counts.items()})
    assert counts[0] == counts[1]
    assert {kind for kind, _ in counts[0]} >= {"all_to_all", "all_reduce", "reduce_scatter"}
    with se.CollectiveCounter() as counter:  # lists, of which some versions of gloo take none
        dist.all_to_all([torch.empty(2)] * 2, [torch.ones(2), torch.ones(2)], group=ours)
    assert counter.sent_bytes == 8


def trained(group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The weights of a data parallel module after some steps, with ranks' own batches."""
    layers = nn.Sequential(nn.Linear(30, 400), nn.ReLU(), nn.Linear(400, 1))
    model = DistributedDataParallel(layers, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(8, 30)).square().mean().backward()
        optimizer.step()
    return [weight.detach() for weight in model.parameters()]


@spmd(world_size=2)
def test_calls_that_do_not_fit_are_refused_by_name_on_all_ranks(env: Env) -> None:
    group, _ = both_of(env)

    def refused(text: str, *calls: Callable[[], object]) -> None:
        with pytest.raises(RunError, match=text):
            calls[env.rank]()

    def barrier() -> None:
        dist.barrier(group=group)

    def sum_of(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        dist.all_reduce(tensor, op, group=group)

    def exchange(received: list[int], sent: list[int], dtype: torch.dtype = torch.float32) -> None:
        rows, given = torch.empty(sum(received), dtype=dtype), torch.ones(sum(sent), dtype=dtype)
        dist.all_to_all_single(rows, given, received, sent, group=group)

    text = r"rank 0 calls all_reduce \(sum\) of float32, 12 bytes and rank 1 calls barrier; call"
    refused(text, lambda: sum_of(torch.ones(3)), barrier)
    text = r"rank 0 calls all_reduce \(sum\) of int32, .* rank 1 calls all_reduce \(max\) of int32"
    ones = torch.ones(3, dtype=torch.int32)
    refused(text, lambda: sum_of(ones), lambda: sum_of(ones, dist.ReduceOp.MAX))
    text = r"in all_reduce \(sum\) of float32, rank 0 has 12 bytes for rank 1, .* expects 16"
    refused(text, lambda: sum_of(torch.ones(3)), lambda: sum_of(torch.ones(4)))
    refused(
        "12 bytes and rank 1.* 8000000 bytes",
        *(lambda n=n: sum_of(torch.ones(n)) for n in (3, LARGE - 1)),
    )
    text = "in all_to_all, rank 0 has 8 bytes for rank 1, in items of 4, which expects 4, in items"
    refused(text, lambda: exchange([1, 1], [1, 2]), lambda: exchange([1, 1], [1, 1]))
    text = "rank 0 has 8 bytes for rank 1, in items of 4, which expects 8, in items of 8"
    refused(text, lambda: exchange([0, 2], [0, 2]), lambda: exchange([1, 0], [1, 0], torch.float64))
    roots = [lambda root=root: dist.broadcast(ones, root, group=group) for root in range(2)]
    refused("broadcast from rank 0 .* rank 1 calls broadcast from rank 1", *roots)
    with pytest.raises(ValueError, match="first dimension of 3 cannot be split evenly between 2"):
        dist.all_to_all_single(torch.empty(3), torch.empty(3), group=group)
    with pytest.raises(ValueError, match=r"the parts \[1, 1\] do not fit a first dimension of 3"):
        dist.all_to_all_single(torch.empty(3), torch.empty(3), [1, 1], [1, 1], group=group)
    sum_of(ones)  # and goes on
    assert ones.tolist() == [2] * 3


def test_a_rank_that_is_alone_uses_no_memory_and_no_group_of_its_own() -> None:
    env = se.init_distributed(device="cpu")
    assert exchange_group(env.device) is dist.group.WORLD
    assert exchange_group(torch.device("cuda", 0)) is dist.group.WORLD
