"""What becomes of an exchange when a rank dies, stops, leaves or is interrupted."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.exchange import exchange_group
from tests.exchange_script import start
from tests.spmd import run_ranks, spmd

MEMORY = "memfd:shardemb-exchange"
SOON_S = 10.0  # the process groups of these tests wait much longer, unless one says otherwise


def refused(text: str, call: Callable[[], object], *, within_s: float = SOON_S) -> None:
    """The call is refused, soon."""
    start = time.monotonic()
    with pytest.raises(RunError, match=text):
        call()
    assert time.monotonic() - start < within_s


def ends(function: Callable[..., None], world_size: int, **arguments: Any) -> str:
    """What the ranks report that did not come to the end of the function."""
    with pytest.raises(AssertionError) as caught:
        run_ranks(function, (world_size, 1), arguments)
    return str(caught.value)


def maps() -> int:
    """How often this process has memory of an exchange mapped."""
    return Path("/proc/self/maps").read_text().count(MEMORY)


def exchange_until_killed(env: Env, num_rows: int) -> None:
    group = exchange_group(env.device)
    rows = torch.rand(num_rows)

    def exchange() -> None:
        dist.all_to_all_single(torch.empty_like(rows), rows, group=group)
        dist.all_reduce(rows, group=group)

    if env.rank == 1:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def go_on() -> None:
        start = time.monotonic()
        while time.monotonic() < start + SOON_S:
            exchange()

    refused(r"rank 1 \(process \d+\) has ended, and did not come to", go_on)
    refused("rank 1", exchange)  # and does not wait again


@pytest.mark.distributed
@pytest.mark.parametrize("num_rows", [30, 3_000_000])
def test_a_killed_rank_is_named_by_the_others_and_leaves_nothing_behind(num_rows: int) -> None:
    before = sorted(os.listdir("/dev/shm"))
    for _ in range(2):  # a job that is started again in the same place
        assert ends(exchange_until_killed, 3, num_rows=num_rows) == "rank 1: the process died"
    assert sorted(os.listdir("/dev/shm")) == before
    held = [path for path in Path("/proc").glob("[0-9]*/maps") if MEMORY in _text_of(path)]
    assert held == []


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended, or is another's
        return ""


@spmd(world_size=3)
def test_a_rank_that_stopped_is_named_when_the_time_is_over(env: Env) -> None:
    exchange_group(env.device)
    group = dist.new_group(timeout=timedelta(seconds=2), backend="shardemb")
    processes = [0] * 3
    dist.all_gather_object(processes, os.getpid())
    if env.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)
        dist.barrier(group=group)  # the others had come to it
        refused("rank [02] .* has left .* when it gave up waiting for rank 1", group.barrier)
        return
    text = r"rank 1 \(process \d+\) did not come to barrier within 2 s|gave up waiting for rank 1 "
    start = time.monotonic()
    refused(text, group.barrier)
    assert time.monotonic() - start > 1
    if env.rank == 0:
        time.sleep(1)
        os.kill(processes[1], signal.SIGCONT)


@spmd(world_size=3)
def test_a_rank_that_left_is_named(env: Env) -> None:
    group = exchange_group(env.device)
    dist.barrier(group=group)
    if env.rank == 2:
        return  # its process ends
    refused("rank 2 .* has ended, and did not come to all_reduce", lambda: total_of(group))


@spmd(world_size=2)
def test_a_rank_that_was_interrupted_is_out_of_step_and_says_so(env: Env) -> None:
    group = exchange_group(env.device)
    dist.barrier(group=group)
    if env.rank == 0:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            dist.barrier(group=group)
        assert time.monotonic() - start < 3
        refused("an earlier collective was interrupted", group.barrier)
        time.sleep(3)
    else:
        time.sleep(2)
        dist.barrier(group=group)  # it had come to it
        refused("rank 0 .* has left the process group", lambda: total_of(group))


def total_of(group: dist.ProcessGroup) -> torch.Tensor:
    total = torch.ones(2)
    dist.all_reduce(total, group=group)
    return total


@spmd(world_size=2)
def test_memory_goes_with_the_group(env: Env) -> None:
    assert maps() == 0
    group = exchange_group(env.device)
    assert exchange_group(env.device) is group
    assert total_of(group).tolist() == [2, 2]
    assert maps() == 2
    files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not any(MEMORY in file for file in files)  # mapped, and by no other way to be had
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    refused("the process group was destroyed", group.barrier)
    del group
    assert maps() == 0
    again = dist.PrefixStore("again", store)
    dist.init_process_group("gloo", store=again, rank=env.rank, world_size=2)
    assert total_of(exchange_group(env.device)).tolist() == [2, 2]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "statuses", "said"),
    [
        ("done", (0, 0), ("", "")),
        ("return", (1, 0), (r"rank 1 \(process \d+\) has (ended|left)", "")),
        ("error", (1, 1), (r"rank 1 \(process \d+\) has (ended|left)", "this rank's own fault")),
        ("interrupt", (1, 1), ("KeyboardInterrupt", "KeyboardInterrupt")),
    ],
)
def test_scripts_end_at_once_and_say_why(
    how: str, statuses: tuple[int, int], said: tuple[str, str]
) -> None:
    ranks = start(how)
    begun = time.monotonic()
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert time.monotonic() - begun < 2 * SOON_S
    assert tuple(rank.returncode for rank in ranks) == statuses, errors
    for text, error in zip(said, errors, strict=True):
        assert re.search(text, error)


@pytest.mark.distributed
def test_a_killed_rank_and_the_others_start_again_on_the_same_port() -> None:
    script = Path(__file__).with_name("restarted_script.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    job = subprocess.run(
        [sys.executable, *command, "--master-port", str(port), str(script)],
        env=os.environ | {"PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    assert "rank 0: 2 ranks, attempt 1" in job.stdout
