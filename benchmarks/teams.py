"""Teams of processes that take turns: each has its number of ranks and its allocator settings.

What is set for a whole process can so be compared step by step, as contenders of one process are.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from benchmarks.contenders import Step
from benchmarks.machine import timed
from benchmarks.ranks import joined, to_launch
from shardemb.env import Env

REST_S = 0.01
"""Between steps, so that the OpenMP threads of the last team no longer wait for work, spinning."""
GLIBC_DEFAULT = {"MALLOC_MMAP_MAX_": "65536"}
"""Chosen by a user, so that init_distributed leaves the allocator as it is."""
Times = dict[tuple[str, Any], list[float]]
"""Milliseconds by team and contender, named as its team names it."""


@dataclass(frozen=True, kw_only=True)
class Team:
    """Ranks that train together.

    Attributes:
        name: Of the team, in the result.
        keeps_freed: Whether init_distributed keeps memory that was freed, else as glibc has it.
        make: The step of each contender; every rank calls it.
        world_size: Number of ranks.
    """

    name: str
    keeps_freed: bool
    make: Callable[[Env], Mapping[Any, Step]]
    world_size: int = 1


def teams_take_turns(teams: Sequence[Team], warmup: int, repeats: int) -> Times:
    """Times of each contender of each team, of its slowest rank; all take turns, a step each."""
    with ExitStack() as stack:
        pipes_of = {team.name: stack.enter_context(_started(team)) for team in teams}
        times: Times = {
            (team, contender): []
            for team, pipes in pipes_of.items()
            for contender in _answers(team, pipes)[0]
        }
        for repeat in range(warmup + repeats):
            for (team, contender), milliseconds in times.items():
                time.sleep(REST_S)
                for pipe in pipes_of[team]:
                    pipe.send(contender)
                slowest = max(_answers(team, pipes_of[team]))
                if repeat >= warmup:
                    milliseconds.append(1e3 * slowest)
    return times


def _answers(team: str, pipes: Sequence[Connection]) -> list[Any]:
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        raise RuntimeError(f"{team}: a process ended; what it said stands above") from None


@contextmanager
def _started(team: Team) -> Iterator[list[Connection]]:
    """The processes of a team, until they are no longer needed."""
    launched = to_launch(team.world_size)
    context = multiprocessing.get_context("forkserver")
    pipes, processes = [], []
    for rank in range(team.world_size):
        mine, its = context.Pipe()
        process = context.Process(target=_member, args=(rank, launched, team, its), daemon=True)
        process.start()
        its.close()
        pipes.append(mine)
        processes.append(process)
    try:
        yield pipes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _member(rank: int, launched: dict[str, str], team: Team, pipe: Connection) -> None:
    """Makes the contenders and steps as it is told."""
    if not team.keeps_freed:
        os.environ |= GLIBC_DEFAULT
    steps = team.make(joined(rank, launched))
    pipe.send(list(steps))
    while True:
        step = steps[pipe.recv()]
        dist.barrier()
        pipe.send(timed(step))
