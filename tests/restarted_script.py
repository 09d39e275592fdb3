"""A job of two ranks whose last rank kills itself in the first attempt, in a collective of ours."""

import os
import signal

import torch
import torch.distributed as dist

import shardemb as se
from shardemb.exchange import exchange_group


def main() -> None:
    """Twenty sums over ranks."""
    env = se.init_distributed(device="cpu", timeout_s=60)
    group = exchange_group(env.device)
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    total = torch.ones(1)
    for step in range(20):
        if step == 10 and env.rank == 1 and attempt == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
    print(f"rank {env.rank}: {int(total)} ranks, attempt {attempt}")  # noqa: T201


if __name__ == "__main__":
    main()
