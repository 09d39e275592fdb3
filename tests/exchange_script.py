"""A script of which a rank ends in some way, while the other waits for it in an exchange."""

import os
import signal
import sys
import threading

import torch
import torch.distributed as dist

import shardemb as se
from shardemb.exchange import exchange_group


def main(how: str) -> None:
    env = se.init_distributed(device="cpu")
    group = exchange_group(env.device)
    total = torch.ones(3)
    dist.all_reduce(total, group=group)
    assert total.tolist() == [2, 2, 2]
    sys.stdout.write("exchanged\n")
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
    main(sys.argv[1])
