"""What benchmarks compare is the same work, and what they conclude is what was measured."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.cases import OPTIMIZERS, Case
from benchmarks.contenders import OWN_LOOP, PIPELINE, PLAIN, TORCHREC, Step
from benchmarks.forward_contenders import UNIFORM
from benchmarks.kernel_contenders import BARE, CONTENDERS, FBGEMM, LOSS, ONLY_FUSED, steps_of
from benchmarks.kernel_targets import (
    AS_INSTALLED,
    KEPT,
    ONE_RANK,
    TWO_RANKS,
    Reached,
    reached,
)
from benchmarks.kernels import (
    COMMON,
    MEMORY_BYTES,
    STEP_CASES,
    bytes_of,
    random_read_gb_per_s,
    rounds_of,
)
from benchmarks.teams import Team, teams_take_turns
from shardemb.env import Env
from tests.spmd import spmd

APART = {"Adam": 2e-4}
"""How far losses may be apart: SparseAdam has eps elsewhere."""


@spmd(world_size=1)
def test_all_contenders_of_the_kernels_train_the_same(env: Env) -> None:
    for optimizer in OPTIMIZERS:
        case = Case(
            optimizer=optimizer, batch_size=64, ids_per_bag=3, num_tables=3, num_embeddings=50
        )
        names = [
            name
            for name in CONTENDERS
            if name != LOSS and not (optimizer == "Adam" and name in ONLY_FUSED)
        ]
        losses = {name: losses_of(step) for name, step in steps_of(case, names, env).items()}
        apart = APART.get(optimizer, 2e-6)
        assert losses[PLAIN][0] - losses[PLAIN][-1] > 40 * apart, optimizer
        for name, of in losses.items():
            assert of == pytest.approx(losses[PLAIN], abs=apart), (optimizer, name)


def losses_of(step: Step) -> list[float]:
    found: list[Any] = [step() for _ in range(4)]
    return [float(loss[1] if isinstance(loss, tuple) else loss) for loss in found]


def test_every_contender_takes_turns_once_beside_the_common_one_within_the_memory() -> None:
    for case in STEP_CASES:
        rounds = list(rounds_of(case))
        others = [key for together in rounds for key in together if key != COMMON]
        kept = {name for setting, name in [*others, COMMON] if setting == KEPT}
        assert len(others) == len(set(others))
        assert kept == set(CONTENDERS) - set(ONLY_FUSED if case.optimizer == "Adam" else ())
        for together in rounds:
            assert together[0] == COMMON
            assert len(together) > 1
            assert sum(bytes_of(case, name) for _, name in together) <= MEMORY_BYTES
    assert max(len(list(rounds_of(case))) for case in STEP_CASES) > 1


def two_steps(env: Env) -> dict[str, Step]:
    """Of which one needs all ranks."""

    def together() -> None:
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones.item() == env.world_size

    return {"together": together, "alone": lambda: None}


def failing(env: Env) -> dict[str, Step]:
    def step() -> None:
        raise ValueError(f"rank {env.rank} fails")

    return {"fails": step}


@pytest.mark.distributed
def test_teams_of_one_and_two_ranks_take_turns_and_one_that_fails_ends_them() -> None:
    alone = Team(name="alone", keeps_freed=False, make=two_steps)
    both = Team(name="both", keeps_freed=True, make=two_steps, world_size=2)
    times = teams_take_turns([alone, both], warmup=1, repeats=3)
    assert list(times) == [
        (team, step) for team in ("alone", "both") for step in ("together", "alone")
    ]
    for milliseconds in times.values():
        assert len(milliseconds) == 3
        assert min(milliseconds) > 0
    with pytest.raises(RuntimeError, match="fails: a process ended"):
        teams_take_turns([Team(name="fails", keeps_freed=True, make=failing)], 0, 1)


def test_memory_gives_the_most_that_was_read_or_copied() -> None:
    lookups = [("a", 1000, 20.0), ("b", 1000, 30.0), ("c", 20, 90.0), ("torch.index_select", 1, 12)]
    found = [
        {"contender": name, "ids_per_bag": ids, "gb_per_s": speed} for name, ids, speed in lookups
    ]
    assert random_read_gb_per_s(found) == 30.0
    found[-1]["gb_per_s"] = 16.0
    assert random_read_gb_per_s(found) == 32.0


def measured(slower: dict[tuple[str, str], float]) -> dict[str, Any]:
    """A result with one case of each part."""
    step = {"optimizer": "RowWiseAdagrad", "batch_size": 8192, "ids_per_bag": 1}
    forward = [
        {"ids": UNIFORM, "ids_per_bag": ids, "contender": name, "gb_per_s": speed}
        for ids in (20, 50)
        for name, speed in ((OWN_LOOP, 21.0), (BARE, 27.0))
    ]
    contenders = [
        {"setting": setting, "contender": name, "over_shardemb": ratio}
        for (setting, name), ratio in slower.items()
    ]
    ranks = [
        {"team": team, "contender": OWN_LOOP, "of_one_rank": ratio}
        for team, ratio in ((ONE_RANK, 1.0), (TWO_RANKS, 0.75))
    ]
    tables = {"num_tables": 26, "num_embeddings": 100_000}
    return {
        "steps": [step | tables | {"contenders": contenders}],
        "forward": forward,
        "random_read_gb_per_s": 30.0,
        "ranks": [step | {"layout": "row_wise", "contenders": ranks}],
    }


def test_targets_are_held_against_what_was_measured() -> None:
    slower = {
        (KEPT, OWN_LOOP): 1.0,
        (KEPT, PIPELINE): 1.2,
        (KEPT, BARE): 0.8,
        (KEPT, FBGEMM): 2.0,
        (KEPT, TORCHREC): 0.9,
        (KEPT, PLAIN): 4.0,
        (AS_INSTALLED, FBGEMM): 3.0,
        (AS_INSTALLED, TORCHREC): 3.5,
        (AS_INSTALLED, PLAIN): 5.0,
    }
    assert [summary(of) for of in reached(measured(slower))] == [
        ("RowWiseAdagrad: FBGEMM used directly / shardemb", False, 2.0, 3.0, 2.5),
        ("RowWiseAdagrad: the best other / shardemb", False, 0.9, 3.0, 1.125),
        ("RowWiseAdagrad: shardemb, own loop / bare kernel", True, 1.25, None, None),
        ("RowWiseAdagrad: shardemb, TrainPipeline / bare kernel", False, 1.5, None, None),
        ("lookup / what memory gives", False, 0.7, None, 0.9),
        ("lookup / what memory gives", False, 0.7, None, 0.9),
        ("samples/s of two ranks / of one", False, 0.75, None, None),
    ]


def summary(of: Reached) -> tuple[str, bool, float, float | None, float | None]:
    return of.target, of.met, round(of.reached, 9), of.installed, of.bare and round(of.bare, 9)
