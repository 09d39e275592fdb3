"""`@spmd(world_size=2)`: a test that is one function, run by ranks in their own group."""

import functools
import importlib
import inspect
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

TIMEOUT_S = 240.0
# The server imports the heavy libraries once; every rank is forked from it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torchrec", "torchrec.distributed.model_parallel", "shardemb.shard"]
)


def spmd(
    world_size: int, *, num_nodes: int = 1, device: str = "cpu"
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on that many ranks, each seeded with its rank; it fails when any of them fails.

    The ranks take themselves to be on that many nodes. On CUDA there must be a device for each.

    The function takes the rank's `Env` first; other parameters are pytest's fixtures and
    parameters, pickled.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def test(**fixtures: Any) -> None:
            run_ranks(function, (world_size, num_nodes), fixtures, device)

        parameters = list(inspect.signature(function).parameters.values())[1:]
        test.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        marked: Callable[..., None] = pytest.mark.distributed(test)
        return marked

    return decorate


def run_ranks(
    function: Callable[..., None],
    ranks_and_nodes: tuple[int, int],
    arguments: dict[str, Any],
    device: str = "cpu",
) -> None:
    """Runs the function under a decorated test on all ranks and raises what they raised."""
    world_size, _ = ranks_and_nodes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_run_rank,
            args=(
                there,
                (function.__module__, function.__qualname__),
                rank,
                ranks_and_nodes,
                port,
                arguments | {"device": device},
            ),
            daemon=True,
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    failures = _collect(pipes)
    for process in processes:
        process.join(timeout=10 if not failures else 0.1)
        process.kill()
    if failures:
        raise AssertionError(
            "\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items()))
        )


def _collect(pipes: list[Connection]) -> dict[int, str]:
    """Waits for all ranks, or for the first that fails and then briefly for the others."""
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = wait(list(waiting.values()), timeout=2.0 if failures else TIMEOUT_S)
        if not ready:
            if not failures:
                failures |= dict.fromkeys(waiting, f"no answer after {TIMEOUT_S:.0f} s")
            break
        for rank, pipe in list(waiting.items()):
            if pipe not in ready:
                continue
            try:
                text = pipe.recv()
            except EOFError:
                text = "the process died"
            if text:
                failures[rank] = text
            del waiting[rank]
    return failures


def _run_rank(
    pipe: Connection,
    test: tuple[str, str],
    rank: int,
    ranks_and_nodes: tuple[int, int],
    port: int,
    arguments: dict[str, Any],
) -> None:
    world_size, num_nodes = ranks_and_nodes
    local_world_size = world_size // num_nodes
    module, name = test
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local_world_size),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    text = ""
    try:
        import torch

        from shardemb.env import init_distributed

        torch.set_num_threads(1)
        torch.manual_seed(rank)
        function = inspect.unwrap(getattr(importlib.import_module(module), name))
        device = arguments.pop("device")
        function(init_distributed(device=device, timeout_s=TIMEOUT_S / 2), **arguments)
    except BaseException:  # noqa: BLE001 - sent to the parent
        text = traceback.format_exc()
    pipe.send(text)
    pipe.close()
    sys.stdout.flush()
    os._exit(0)
