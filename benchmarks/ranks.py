"""Processes for the ranks of a benchmark, and contenders that take turns on them."""

import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import shardemb as se


def on_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Runs `function(env, *args)` on that many ranks, each in a process with its share of cores."""
    # glibc reads these when a process starts; without them each step pays for page faults
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_run_rank, (world_size, port, function, args), nprocs=world_size)


def _run_rank(
    rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    function(se.init_distributed(device="cpu"), *args)


def take_turns(
    steps: Mapping[str, Callable[[], object]], warmup: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of each step, of the slowest rank; contenders take turns, a step each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warmup + repeats):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if repeat >= warmup:
                seconds[name].append(1e3 * float(taken))
    return seconds
