"""Measures this machine, so that one can plan for it: memory, its bandwidth, what ranks exchange.

Starts processes of its own, which exchange bytes as a training step does, and prints what it finds.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import TextIO

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardemb.cluster import Cluster
from shardemb.errors import RunError
from shardemb.exchange import exchange_group
from shardemb.host_memory import host_memory_bytes
from shardemb.text import format_bytes

_COPIED_BYTES = 1 << 28
_SENT_BYTES = 1 << 24
_WARMUP, _REPEATS = 2, 7
_TIMEOUT_S = 120.0


def probe(*, num_ranks: int | None = None, out: TextIO | None = None) -> Cluster:
    """Measures this node, with a rank on each of its GPUs, or without any with two ranks on CPU.

    The bandwidth of memory is that of a copy of 256 MiB, bytes read and bytes written together,
    while all ranks copy. The exchange is an all-to-all of 16 MiB from each rank to each other, over
    NCCL between GPUs, and on CPU through shared memory, or gloo where that is not to be had. Both
    are medians of 7 times after 2 of warm-up, on the slowest rank.

    Args:
        num_ranks: Number of ranks; by default one for each GPU, or 2.
        out: Where to print what is measured; by default stdout.

    Returns:
        This node as a cluster. What goes between nodes cannot be measured on one, and is taken as
        what goes within it: give a cluster of more nodes an `inter_node_gb_per_s` of its own.

    Raises:
        ValueError: `num_ranks` is not positive, or more than there are GPUs.
        RunError: A process that measures fails, or is not done after two minutes.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = num_ranks if num_ranks is not None else num_gpus or 2
    if asked < 1 or asked > (num_gpus or asked):
        most = f"the {num_gpus} GPUs that are here" if num_gpus else "any number"
        raise ValueError(f"probe: num_ranks must be from 1 to {most}, got {asked}")
    copied, sent = _measured(asked, on_cuda=num_gpus > 0)
    cluster = Cluster(
        name=torch.cuda.get_device_name(0) if num_gpus else "the CPU of this machine",
        ranks_per_node=asked,
        device="cuda" if num_gpus else "cpu",
        memory_bytes=torch.cuda.get_device_properties(0).total_memory
        if num_gpus
        else host_memory_bytes() // asked,
        memory_gb_per_s=copied,
        intra_node_gb_per_s=sent or copied,
        inter_node_gb_per_s=sent or copied,
    )
    (out or sys.stdout).write(_report(cluster, exchanged=sent is not None))
    return cluster


def _report(cluster: Cluster, *, exchanged: bool) -> str:
    exchange = f"{cluster.intra_node_gb_per_s:.3g} GB/s, by an all-to-all of 16 MiB to each"
    if not exchanged:
        exchange = "nothing, there is one rank: taken as the bandwidth of its memory"
    return (
        f"measured: {cluster.name}, {cluster.ranks_per_node} rank"
        f"{'s' * (cluster.ranks_per_node > 1)}\n"
        f"  memory of a rank     {format_bytes(cluster.memory_bytes)}\n"
        f"  its bandwidth        {cluster.memory_gb_per_s:.3g} GB/s, by copies on all at once\n"
        f"  sent to other ranks  {exchange}\n"
        "  sent between nodes   not measured, taken as within this one\n"
    )


def _measured(num_ranks: int, *, on_cuda: bool) -> tuple[float, float | None]:
    """GB/s of a copy and of an exchange, of processes that measure together.

    Raises:
        RunError: One of them fails, or they are not done in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(
            _measure,
            args=(num_ranks, folder, on_cuda),
            nprocs=num_ranks,
            join=False,
            start_method="spawn",
        )
        end = time.monotonic() + _TIMEOUT_S
        try:
            while not processes.join(timeout=1.0):
                if time.monotonic() > end:
                    raise RunError(
                        f"probe: its {num_ranks} ranks are not done in {_TIMEOUT_S:.0f} s"
                    )
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            last = str(error).strip().splitlines()[-1]
            raise RunError(f"probe: rank {error.error_index} failed: {last}") from error
        finally:
            for process in processes.processes:
                process.kill()
        answers = [json.loads((Path(folder) / f"{rank}").read_text()) for rank in range(num_ranks)]
    copied_s, sent_s = (max(of) for of in zip(*answers, strict=True))
    sent_bytes = _SENT_BYTES * (num_ranks - 1)
    return 2 * _COPIED_BYTES / copied_s / 1e9, sent_bytes / sent_s / 1e9 if sent_bytes else None


def _measure(rank: int, num_ranks: int, folder: str, on_cuda: bool) -> None:  # noqa: FBT001
    """One of the ranks: writes down its seconds for a copy and for an exchange."""
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    source = torch.zeros(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = [_seconds(lambda: target.copy_(source), device)]
    size = num_ranks * _SENT_BYTES // 4
    send, receive = source.new_zeros(size), source.new_empty(size)
    group = exchange_group(device)
    seconds.append(_seconds(lambda: dist.all_to_all_single(receive, send, group=group), device))
    (Path(folder) / f"{rank}").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for repeat in range(_WARMUP + _REPEATS):
        dist.barrier()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= _WARMUP:
            times.append(time.perf_counter() - start)
    return median(times)
