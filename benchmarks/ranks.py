"""Processes for the ranks of a benchmark, and contenders that take turns on them."""

import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import shardemb as se
from shardemb.env import Env

KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""For times: memory that was freed is used again; else each step pays for page faults."""
GIVE_BACK_FREED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""For resident memory: freed buffers of that size go back to the system."""


def on_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    num_nodes: int = 1,
    malloc: Mapping[str, str] = KEEP_FREED,
) -> list[Any]:
    """What `function(env, *args)` returns on each rank, through JSON.

    Each rank is a process with its share of cores. All calls in a script take the same `malloc`:
    glibc reads it when the process starts that forks the ranks.
    """
    os.environ |= malloc
    launched = to_launch(world_size, num_nodes=num_nodes)
    with tempfile.TemporaryDirectory() as out:
        mp.start_processes(
            _run_rank, (launched, out, function, args), world_size, start_method="forkserver"
        )
        return [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(world_size)]


def to_launch(world_size: int, *, num_nodes: int = 1) -> dict[str, str]:
    """What the environment of new processes must say, which a server forks ready to start."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["shardemb.shard"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size // num_nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def joined(rank: int, launched: dict[str, str]) -> Env:
    """This process as a rank of them, with its share of cores."""
    local_rank = rank % int(launched["LOCAL_WORLD_SIZE"])
    os.environ |= launched | {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
    num_threads = len(os.sched_getaffinity(0)) // int(launched["WORLD_SIZE"])
    torch.set_num_threads(max(1, num_threads))
    return se.init_distributed(device="cpu")


def _run_rank(
    rank: int,
    launched: dict[str, str],
    out: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    found = function(joined(rank, launched), *args)
    Path(out, f"{rank}.json").write_text(json.dumps(found))


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
