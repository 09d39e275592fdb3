"""Checks of a process group's collectives against gloo, and against torch in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from shardemb.env import Env

LARGE = 2_000_001  # float32 numbers that do not go through shared memory in one piece


def check_equal(
    env: Env, group: dist.ProcessGroup, call: Callable[[dist.ProcessGroup], list[torch.Tensor]]
) -> None:
    """Calls it in the group and in gloo's with the same random numbers; compares bit for bit."""
    found = []
    assert dist.group.WORLD is not None
    for one in (group, dist.group.WORLD):
        torch.manual_seed(env.rank)
        found.append(call(one))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def check_moves(env: Env, group: dist.ProcessGroup) -> None:
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

        check_equal(env, group, exchange)
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

    check_equal(env, group, gather)
    check_equal(env, group, even_splits)
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


def check_sums(env: Env, group: dist.ProcessGroup) -> None:
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
    for dtype in (torch.float16, torch.bfloat16):
        check_all_halves(env, group, dtype)
    for total in (torch.rand(1_001) / 3, torch.rand(LARGE) / 3):
        dist.all_reduce(total, group=group)
        of_all = [torch.empty_like(total) for _ in range(env.world_size)]
        dist.all_gather(of_all, total, group=group)
        assert all(torch.equal(total, other) for other in of_all)  # the same bits on all ranks
    with pytest.raises(ValueError, match=r"tensors of torch\.int64 cannot be reduced by avg"):
        dist.all_reduce(torch.ones(1, dtype=torch.int64), dist.ReduceOp.AVG, group=group)


def check_all_halves(env: Env, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """Each number of two bytes, and the sum of two."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    of_ranks = [numbers, torch.full_like(numbers, 0.3), *[torch.zeros_like(numbers)] * 2]
    total = of_ranks[env.rank].clone()
    dist.all_reduce(total, group=group)
    expected = (numbers.float() + of_ranks[1].float()).to(dtype)
    torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)


def check_scattered_sums(env: Env, group: dist.ProcessGroup) -> None:
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
