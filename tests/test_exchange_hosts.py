"""The exchange of ranks that share no memory with some or all others."""

import shutil
import subprocess

import pytest
import torch
import torch.distributed as dist

from shardemb import layouts
from shardemb.env import Env
from shardemb.exchange import exchange_group
from shardemb.exchange.group import ExchangeGroup
from shardemb.exchange.several_hosts import SeveralHosts
from tests.every_layout import check
from tests.exchange_script import start
from tests.moved_tensors import check_moves, check_scattered_sums, numbers_of
from tests.spmd import spmd
from tests.test_every_layout import cases, every_layout


def on_hosts(env: Env, host: int, num_neighbours: int) -> ExchangeGroup:
    """Our group, as if only ranks of one number were on one host."""
    group = exchange_group(env.device, host=f"host {host}")
    assert isinstance(group, ExchangeGroup)
    route = group.collectives.route
    assert isinstance(route, SeveralHosts)
    assert (0 if route.memory is None else route.memory.size) == num_neighbours
    return group


def check_others(env: Env, group: dist.ProcessGroup) -> None:
    of_ranks = numbers_of(env, torch.float32, 5_000)
    total = of_ranks[env.rank].clone()
    dist.all_reduce(total, group=group)
    assert torch.equal(total, of_ranks.sum(0))
    dist.all_reduce(total, dist.ReduceOp.AVG, group=group)
    torch.testing.assert_close(total, of_ranks.sum(0))
    dist.broadcast(total, src=1, group=group)
    dist.barrier(group=group)


@spmd(world_size=4)
def test_two_hosts_of_two_ranks_exchange_like_gloo(env: Env) -> None:
    group = on_hosts(env, env.rank % 2, 2)  # neighbours are not next to each other
    check_moves(env, group)
    check_scattered_sums(env, group)
    check_others(env, group)


@spmd(world_size=3)
def test_a_rank_without_neighbours_exchanges_with_those_that_have_some(env: Env) -> None:
    group = on_hosts(env, min(env.rank, 1), 0 if env.rank == 0 else 2)
    check_moves(env, group)
    check_scattered_sums(env, group)
    check_others(env, group)


@spmd(world_size=4, num_nodes=2)
def test_every_layout_trains_alike_over_two_hosts(env: Env) -> None:
    on_hosts(env, env.rank // 2, 2)
    for layout in every_layout(env):
        case = list(cases(env, layout, sequence=False))[3]  # batches of several sizes
        check(env, case)


@spmd(world_size=2)
def test_all_ranks_go_through_gloo_where_one_has_no_compiled_code(env: Env) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if env.rank == 1:  # installed where there is no compiler
            patch.setattr("shardemb.exchange.neighbours.library", lambda: None)
        assert exchange_group(env.device) is dist.group.WORLD
    assert exchange_group(env.device) is dist.group.WORLD
    check(env, next(cases(env, layouts.row_wise(), sequence=False)))


@pytest.mark.distributed
@pytest.mark.parametrize("options", [(), ("said to be the same host",)])
def test_ranks_in_other_containers_share_no_memory(options: tuple[str, ...]) -> None:
    apart = ("unshare", "--pid", "--fork", "--mount-proc")
    if shutil.which(apart[0]) is None or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("may not make a namespace of processes")
    for of_last, route in ((apart, "SeveralHosts"), ((), "SharedMemory")):
        for rank in start("done", *options, of_last=of_last, by=route):
            assert rank.wait(timeout=60) == 0
