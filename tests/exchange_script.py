"""A script of which a rank ends in some way, while the other waits for it in an exchange."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import shardemb as se
from shardemb.exchange import exchange_group
from shardemb.exchange.group import ExchangeGroup


def start(
    how: str, *options: str, of_last: Sequence[str] = (), by: str = "SharedMemory"
) -> list[subprocess.Popen[str]]:
    """Starts the script on two ranks, the last one by some command; they say how they exchange."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(
            [*before, sys.executable, "-m", "tests.exchange_script", how, *options],
            cwd=Path(__file__).parents[1],
            env=os.environ
            | launched
            | {"MASTER_PORT": f"{port}", "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, before in (("0", ()), ("1", of_last))
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == f"exchanged by {by}\n"
    return ranks


def main(how: str, host: str | None = None) -> None:
    env = se.init_distributed(device="cpu")
    group = exchange_group(env.device, host=host)
    total = torch.ones(3)
    dist.all_reduce(total, group=group)
    assert total.tolist() == [2, 2, 2]
    assert isinstance(group, ExchangeGroup)
    sys.stdout.write(f"exchanged by {type(group.collectives.route).__name__}\n")
    sys.stdout.flush()
    if how == "error" and env.rank == 1:
        raise ValueError("this rank's own fault")
    if how == "return" and env.rank == 1:
        return
    if how == "interrupt":
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        if env.rank == 1:
            signal.pause()
    if how != "done":
        dist.all_reduce(total, group=group)


if __name__ == "__main__":
    main(*sys.argv[1:])
