"""What is counted of each collective, by hand."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import comm_ops

import shardemb as se
from shardemb.env import Env
from shardemb.errors import RunError
from tests.spmd import spmd


def float32(num_bytes: int) -> torch.Tensor:
    return torch.ones(num_bytes // 4)


def counted(counter: se.CollectiveCounter) -> dict[str, tuple[float, float, int]]:
    """Bytes sent, kept and in buffers, by kind; all of one process group."""
    return {
        kind: (count.sent_bytes, count.kept_bytes, count.buffer_bytes)
        for (kind, _), count in counter.counts.items()
    }


@spmd(world_size=4)
def test_each_collective_sends_what_must_leave_the_rank(env: Env) -> None:
    parts = [float32(8 * (rank + 1)) for rank in range(4)]
    mine = 8 * (env.rank + 1)
    with se.CollectiveCounter() as counter:
        dist.all_to_all_single(
            torch.empty(4 * mine // 4), torch.cat(parts), [mine // 4] * 4, [2, 4, 6, 8]
        )
        dist.reduce_scatter_tensor(torch.empty(8), float32(128))
        dist.all_gather_into_tensor(torch.empty(32), float32(32))
        dist.all_reduce(float32(16))
        dist.broadcast(float32(24), src=1)
        dist.reduce(float32(24), dst=1)
        dist.gather(float32(8), [float32(8) for _ in parts] if env.rank == 1 else None, dst=1)
        dist.scatter(torch.empty(2), [float32(8) for _ in parts] if env.rank == 1 else None, src=1)
        if env.rank == 0:
            dist.send(float32(12), dst=1)
        elif env.rank == 1:
            dist.recv(torch.empty(3), src=0)
        dist.barrier()
    is_root = env.rank == 1
    expected = {
        "all_to_all": (80 - mine, mine, 80 + 4 * mine),
        "reduce_scatter": (96, 32, 128 + 32),
        "all_gather": (96, 32, 128 + 32),
        "all_reduce": (24, 0, 16),
        "broadcast": (72 * is_root, 0, 24),
        "reduce": (24 * (not is_root), 0, 24),
        "gather": (8 * (not is_root), 0, 8 + 32 * is_root),
        "scatter": (24 * is_root, 8 * is_root, 8 + 32 * is_root),
    }
    if env.rank == 0:
        expected["send"] = (12, 0, 12)
    assert counted(counter) == expected
    assert counter.sent_bytes == sum(sent for sent, _, _ in expected.values())
    assert {size for _, size in counter.counts} == {4}
    assert ["all_reduce", "4", "1", "24"] in [line.split() for line in str(counter).splitlines()]


@spmd(world_size=2)
def test_lists_functional_and_torchrec_collectives_count_alike(env: Env) -> None:
    pair = dist.new_group([0, 1])
    with se.CollectiveCounter() as plain:
        dist.reduce_scatter(torch.empty(4 * (env.rank + 1)), [float32(16), float32(32)])
        dist.all_gather([float32(16), float32(16)], float32(16))
        dist.all_reduce(float32(16))
    assert counted(plain)["reduce_scatter"] == [(32, 16, 48 + 16), (16, 32, 48 + 32)][env.rank]
    assert counted(plain)["all_gather"] == (16, 16, 48)
    with se.CollectiveCounter() as traced:
        functional.all_reduce(float32(16), "sum", pair)
        functional.all_gather_tensor(float32(16), 0, pair)
    assert counted(traced)["all_reduce"][:2] == counted(plain)["all_reduce"][:2]
    assert counted(traced)["all_gather"][:2] == counted(plain)["all_gather"][:2]
    with se.CollectiveCounter() as differentiated:
        rows = torch.ones(4, 2, requires_grad=True)
        out = comm_ops.reduce_scatter_base_sync(
            pair, comm_ops.ReduceScatterBaseInfo(input_sizes=rows.size()), rows
        )
        out.square().sum().backward()
    assert counted(differentiated)["reduce_scatter"][:2] == (16, 16)
    assert counted(differentiated)["all_gather"][:2] == (16, 16)


@spmd(world_size=2)
def test_gradients_of_data_parallel_modules_are_counted(env: Env) -> None:
    model = DistributedDataParallel(nn.Linear(15, 1))
    for _ in range(3):
        with se.CollectiveCounter() as counter:
            model(torch.ones(2, 15) * env.rank).sum().backward()
    assert counted(counter) == {"all_reduce": (64, 0, 64)}


def test_a_collective_that_is_not_known_is_refused() -> None:
    library = torch.library.Library("torchrec", "FRAGMENT")
    library.define("exchange_unheard_of(Tensor rows) -> Tensor")
    library.impl("exchange_unheard_of", torch.clone, "CPU")
    rows = torch.ones(1)
    assert torch.ops.torchrec.exchange_unheard_of(rows) == rows
    text = "does not know what torchrec::exchange_unheard_of sends"
    with pytest.raises(RunError, match=text), se.CollectiveCounter():
        torch.ops.torchrec.exchange_unheard_of(rows)
