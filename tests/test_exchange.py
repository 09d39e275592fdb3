"""The collectives of our own process group, beside those of gloo and sums in float64."""

from collections.abc import Callable, Iterator

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
from tests.spmd import spmd

CPU = torch.device("cpu")
LARGE = 300_001  # float32 numbers that do not go through shared memory in one piece


def both_of(env: Env) -> tuple[ExchangeGroup, dist.ProcessGroup]:
    """Our group, through memory, and gloo."""
    ours, world = exchange_group(env.device), dist.group.WORLD
    assert isinstance(ours, ExchangeGroup)
    assert isinstance(ours.collectives.route, SharedMemory)
    assert world is not None
    return ours, world


def check_equal(
    env: Env, call: Callable[[dist.ProcessGroup], list[torch.Tensor]], *, seed: int = 0
) -> None:
    """Calls it in both groups with the same random numbers, and compares bit for bit."""
    found = []
    for group in both_of(env):
        torch.manual_seed(env.rank + 100 * seed)
        found.append(call(group))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def check_moves(env: Env) -> None:
    size = env.world_size
    sizes = [[(3 * to + 5 * of + to * of) % 4 for to in range(size)] for of in range(size)]

    for scale in (0, 1, 40_000):
        sent = [scale * number for number in sizes[env.rank]]
        received = [scale * row[env.rank] for row in sizes]

        def exchange(
            group: dist.ProcessGroup, sent: list[int] = sent, received: list[int] = received
        ) -> list[torch.Tensor]:
            rows = torch.empty(sum(received), 3, dtype=torch.float64)
            given = torch.rand(sum(sent), 3, dtype=torch.float64)
            dist.all_to_all_single(rows, given, received, sent, group=group)
            return [rows]

        check_equal(env, exchange)
        group, _ = both_of(env)
        parts = [torch.full((number,), 10 * env.rank + to) for to, number in enumerate(sent)]
        listed = [torch.empty(number, dtype=torch.int64) for number in received]
        dist.all_to_all(listed, parts, group=group, async_op=True).wait()
        assert [set(part.tolist()) for part in listed] == [
            {10 * of + env.rank} if number else set() for of, number in enumerate(received)
        ]

    def gather(group: dist.ProcessGroup) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for num in (0, 1, LARGE):
            rows = torch.rand(num, 2)
            listed = [torch.empty(2, num).t() for _ in range(size)]  # not contiguous
            dist.all_gather(listed, rows, group=group)
            whole = torch.empty(size * num, 2)
            dist.all_gather_into_tensor(whole, rows, group=group)
            for root in range(size):
                dist.broadcast(rows.t(), src=root, group=group)
            found += [*listed, whole, rows]
        return found

    check_equal(env, gather)
    check_equal(env, even_splits)
    group, _ = both_of(env)
    for dtype in (torch.bool, torch.int16, torch.bfloat16, torch.complex64, torch.float8_e5m2):
        given = torch.arange(size).to(dtype)  # gloo takes few of these
        taken = torch.empty_like(given)
        dist.all_to_all_single(taken, given, group=group)
        assert torch.equal(
            taken.to(torch.complex64), given[env.rank].to(torch.complex64).expand(size)
        )
    turned = torch.empty(2, size, dtype=torch.int64).t()  # gloo takes no such
    dist.all_to_all_single(turned, torch.arange(2 * size).view(2, size).t(), group=group)
    assert turned.tolist() == [[env.rank, size + env.rank]] * size
    unequal = [torch.empty(5 * rank) for rank in range(size)]
    dist.all_gather(unequal, torch.full((5 * env.rank,), float(env.rank)), group=group)
    assert [set(found.tolist()) for found in unequal[1:]] == [{rank} for rank in range(1, size)]


def even_splits(group: dist.ProcessGroup) -> list[torch.Tensor]:
    given = torch.randint(0, 99, (group.size(), 5), dtype=torch.uint8)
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given, group=group)
    return [taken]


def reductions() -> Iterator[tuple[torch.dtype, list[str]]]:
    yield torch.bool, ["SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"]
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        yield dtype, ["SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"]
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        yield dtype, ["SUM", "AVG", "PRODUCT", "MIN", "MAX"]


def reduced(of_ranks: torch.Tensor, op: str) -> torch.Tensor:
    """All ranks' numbers [W, N] in one, by torch; floats in float64."""
    exact = of_ranks.double() if of_ranks.is_floating_point() else of_ranks
    if op in {"BAND", "BOR", "BXOR"}:
        total = exact[0].clone()
        for other in exact[1:]:
            total = {"BAND": total & other, "BOR": total | other, "BXOR": total ^ other}[op]
        return total
    if op in {"MIN", "MAX"}:
        return exact.amin(0) if op == "MIN" else exact.amax(0)
    if of_ranks.dtype == torch.bool:
        return exact.any(0) if op == "SUM" else exact.all(0)
    total = exact.prod(0) if op == "PRODUCT" else exact.sum(0)
    total = total / len(of_ranks) if op == "AVG" else total
    return total if of_ranks.is_floating_point() else total.to(of_ranks.dtype)  # wraps around


def numbers_of(env: Env, dtype: torch.dtype, num: int) -> torch.Tensor:
    """Of all ranks [W, N]."""
    torch.manual_seed(num)
    return torch.randint(-100, 100, (env.world_size, num)).to(dtype)


def check_sums(env: Env) -> None:
    group, _ = both_of(env)
    for dtype, ops in reductions():
        for op in ops:
            for num in (1, 1_000, 50_001):
                if num > 1_000 and (dtype, op) != (torch.float32, "AVG") and op != "SUM":
                    continue
                of_ranks = numbers_of(env, dtype, num)
                total = of_ranks[env.rank].clone()
                dist.all_reduce(total, getattr(dist.ReduceOp, op), group=group)
                expected = reduced(of_ranks, op)
                tolerance = torch.finfo(dtype).eps if dtype.is_floating_point else 0
                torch.testing.assert_close(
                    total, expected.to(dtype), rtol=tolerance, atol=0, msg=f"{dtype} {op} {num}"
                )
    for total in (torch.rand(1_001) / 3, torch.rand(LARGE) / 3):
        dist.all_reduce(total, group=group)
        of_all = [torch.empty_like(total) for _ in range(env.world_size)]
        dist.all_gather(of_all, total, group=group)
        assert all(torch.equal(total, other) for other in of_all)  # the same bits on all ranks
    with pytest.raises(ValueError, match=r"tensors of torch\.int64 cannot be reduced by avg"):
        dist.all_reduce(torch.ones(1, dtype=torch.int64), dist.ReduceOp.AVG, group=group)


def check_scattered_sums(env: Env) -> None:
    group, _ = both_of(env)
    of_ranks = numbers_of(env, torch.float32, env.world_size * 90_000).double() / 3
    mine = of_ranks[env.rank].float()
    part = torch.empty(90_000)
    dist.reduce_scatter_tensor(part, mine, group=group)
    expected = of_ranks.float().double().sum(0).chunk(env.world_size)[env.rank]
    torch.testing.assert_close(part, expected.float())
    sizes = [0 if rank == 1 else 7 * rank + 2 for rank in range(env.world_size)]
    part = torch.empty(sizes[env.rank])
    parts = list(mine[: sum(sizes)].split(sizes))
    dist.reduce_scatter(part, parts, dist.ReduceOp.MAX, group=group)
    expected = of_ranks.float()[:, : sum(sizes)].amax(0).split(sizes)[env.rank]
    torch.testing.assert_close(part, expected.float(), rtol=0, atol=0)


@spmd(world_size=2)
def test_collectives_of_two_ranks_are_those_of_gloo(env: Env) -> None:
    check_moves(env)
    check_sums(env)
    check_scattered_sums(env)


@spmd(world_size=3)
def test_collectives_of_three_ranks_are_those_of_gloo(env: Env) -> None:
    check_moves(env)
    check_sums(env)
    check_scattered_sums(env)


@spmd(world_size=4)
def test_collectives_of_four_ranks_and_of_some_of_them(env: Env) -> None:
    check_moves(env)
    check_scattered_sums(env)
    of_ranks: list[object] = [None] * 4
    group, _ = both_of(env)
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

    check_equal(env, call)
    counts = []
    for group in (ours, world):
        with se.CollectiveCounter() as counter:
            call(group)
            even_splits(group)
            dist.reduce_scatter(torch.empty(1), [torch.ones(1)] * 2, group=group)
            dist.all_to_all([torch.empty(2)] * 2, [torch.ones(2)] * 2, group=group)
            dist.broadcast(torch.ones(3), src=1, group=group)
        counts.append({key: vars(count) for key, count in counter.counts.items()})
    assert counts[0] == counts[1]
    assert {kind for kind, _ in counts[0]} >= {"all_to_all", "all_reduce", "reduce_scatter"}


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
        "12 bytes and rank 1.* 1200000 bytes",
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
