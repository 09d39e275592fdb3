"""A job of two ranks whose last rank kills itself in the first attempt, in a collective of ours."""

import os
import signal

import torch
import torch.distributed as dist

import shardemb as se
from shardemb.exchange import exchange_group

env = se.init_distributed(device="cpu", timeout_s=60)
group = exchange_group(env.device)
for step in range(20):
    if step == 10 and env.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
print(  # noqa: T201 - what the test reads
    f"rank {env.rank}: {int(total)} ranks, attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}"
)
