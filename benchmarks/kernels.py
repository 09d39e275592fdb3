"""What do the CPU kernels cost a step, beside what a user would take instead?

A step is lookup, backward and update on one rank with all threads, by FBGEMM, TorchRec,
nn.EmbeddingBag and shardemb; then the lookup alone beside what memory gives; then two ranks with a
share of the threads each beside one with all; and last the targets. Contenders take turns, a step
each, in processes of both allocator settings. Takes some twenty minutes and 20 GB on two cores.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import EMBEDDING_DIM, OPTIMIZERS, Case
from benchmarks.contenders import OWN_LOOP, PLAIN, TORCHREC
from benchmarks.forward_contenders import GATHER, LONG, forwards
from benchmarks.kernel_contenders import CONTENDERS, FBGEMM, LOSS, ONLY_FUSED, steps_of
from benchmarks.kernel_targets import AS_INSTALLED, KEPT, ONE_RANK, TWO_INSTALLED, TWO_RANKS
from benchmarks.kernels_page import report
from benchmarks.machine import copy_gb_per_s, describe
from benchmarks.script import parser_of, write_result
from benchmarks.step import ideal_bytes, summary
from benchmarks.teams import Team, Times, teams_take_turns

MEMORY_BYTES = 18 << 30
"""That contenders of a round may fill; those that do not fit take turns in another round."""
OVERHEAD_BYTES = 400 << 20
"""Of a contender beside its tables: libraries, batches, outputs."""
Key = tuple[str, str]
"""Allocator setting and contender."""
COMMON: Key = (KEPT, OWN_LOOP)
"""Takes part in every round; the others are compared with it."""
STEP_CASES = [
    Case(
        optimizer=optimizer,
        batch_size=batch_size,
        ids_per_bag=ids,
        num_tables=num_tables,
        num_embeddings=num_embeddings,
    )
    for num_tables, num_embeddings, batch_size, ids in (
        (26, 100_000, 8192, 1),
        (26, 100_000, 2048, 20),
        (8, 1_000_000, 2048, 20),
    )
    for optimizer in OPTIMIZERS
]
RANK_CASES = [
    Case(
        optimizer="RowWiseAdagrad",
        batch_size=batch_size,
        ids_per_bag=ids,
        layout=layout,
        world_size=2,
    )
    for batch_size, ids in ((8192, 1), (2048, 20))
    for layout in ("table_wise", "row_wise")
]


def bytes_of(case: Case, contender: str) -> int:
    """Memory that a contender fills, as estimated beforehand."""
    if contender == LOSS:
        return OVERHEAD_BYTES
    row_wise_by_torch = contender == PLAIN and case.optimizer == "RowWiseAdagrad"
    optimizer = OPTIMIZERS["Adagrad" if row_wise_by_torch else case.optimizer]
    num_rows = case.num_tables * case.num_embeddings
    state_bytes = optimizer.state_bytes(num_rows, EMBEDDING_DIM)
    return 4 * EMBEDDING_DIM * num_rows + state_bytes + OVERHEAD_BYTES


def rounds_of(case: Case) -> Iterator[list[Key]]:
    """Who takes turns with whom: the common one with as many others as fit into memory."""
    names = [name for name in CONTENDERS if case.optimizer != "Adam" or name not in ONLY_FUSED]
    others = [(AS_INSTALLED, name) for name in names if name in {FBGEMM, TORCHREC, PLAIN, LOSS}]
    others += [(KEPT, name) for name in names if (KEPT, name) != COMMON]
    together, filled = [COMMON], bytes_of(case, OWN_LOOP)
    for setting, name in others:
        needed = bytes_of(case, name)
        if filled + needed > MEMORY_BYTES:
            yield together
            together, filled = [COMMON], bytes_of(case, OWN_LOOP)
        together.append((setting, name))
        filled += needed
    yield together


def take_turns_at(case: Case, together: list[Key], warmup: int, repeats: int) -> Times:
    """Times of the contenders of a round."""
    teams = [
        Team(
            name=setting,
            keeps_freed=setting == KEPT,
            make=partial(steps_of, case, [name for of, name in together if of == setting]),
        )
        for setting in dict(together)
    ]
    return teams_take_turns(teams, warmup, repeats)


def over(times: Times, one: Any, other: Any) -> float:
    """How many times as long one takes, by the steps that followed each other."""
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def measure_steps(case: Case, warmup: int, repeats: int) -> dict[str, Any]:
    """The contenders of a case, in all rounds."""
    found, common = [], list[float]()
    for together in rounds_of(case):
        times = take_turns_at(case, together, warmup, repeats)
        common += times[COMMON]
        found += [
            {"ms": summary(times[key]), "over_shardemb": over(times, key, COMMON)} | named(key)
            for key in together
            if key != COMMON
        ]
    first = {"ms": summary(common), "over_shardemb": 1.0} | named(COMMON)
    return asdict(case) | {"ideal_bytes": ideal_bytes(case), "contenders": [first, *found]}


def named(key: Key) -> dict[str, str]:
    """A contender in the result."""
    return {"setting": key[0], "contender": key[1]}


def measure_forwards(warmup: int, repeats: int) -> list[dict[str, Any]]:
    """Lookups alone."""
    team = Team(name=KEPT, keeps_freed=True, make=forwards)
    times = teams_take_turns([team], warmup, repeats)
    return [
        lookup._asdict()
        | {"ms": summary(of), "gb_per_s": lookup.row_bytes / summary(of)["median"] / 1e6}
        for (_, lookup), of in times.items()
    ]


def random_read_gb_per_s(forward: list[dict[str, Any]]) -> float:
    """The most that anyone reads of random rows; who writes as much as it reads counts both."""
    reads: list[float] = [of["gb_per_s"] for of in forward if of["ids_per_bag"] == LONG]
    copies: list[float] = [2 * of["gb_per_s"] for of in forward if of["contender"] == GATHER]
    return max(reads + copies)


def measure_ranks(case: Case, warmup: int, repeats: int) -> dict[str, Any]:
    """Two ranks beside one, which has the threads of both."""
    alone = replace(case, layout="table_wise", world_size=1)
    both, torchrec = [OWN_LOOP, TORCHREC], [TORCHREC]
    teams = [
        Team(name=ONE_RANK, keeps_freed=True, make=partial(steps_of, alone, both)),
        Team(name=TWO_RANKS, keeps_freed=True, make=partial(steps_of, case, both), world_size=2),
        Team(
            name=TWO_INSTALLED,
            keeps_freed=False,
            make=partial(steps_of, case, torchrec),
            world_size=2,
        ),
    ]
    times = teams_take_turns(teams, warmup, repeats)
    found = []
    for (team, contender), of in times.items():
        one = (ONE_RANK, contender)
        found.append(
            {
                "team": team,
                "contender": contender,
                "ms": summary(of),
                "samples_per_s": case.batch_size / summary(of)["median"] * 1e3,
                "of_one_rank": over(times, one, (team, contender)),
            }
        )
    return asdict(case) | {"contenders": found}


def main() -> None:
    """Measures all, prints the page and writes it with its JSON."""
    parser = parser_of(__doc__, repeats=20, warmup=8)
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        action="append",
        help="only steps of this one; may stand several times (default: all)",
    )
    asked = parser.parse_args()
    often = asked.warmup, asked.repeats
    forward = measure_forwards(*often)
    measured = {
        "machine": describe(),
        "warmup": asked.warmup,
        "repeats": asked.repeats,
        "copy_gb_per_s": copy_gb_per_s(),
        "random_read_gb_per_s": random_read_gb_per_s(forward),
        "steps": [
            measure_steps(case, *often)
            for case in STEP_CASES
            if case.optimizer in (asked.optimizer or OPTIMIZERS)
        ],
        "forward": forward,
        "ranks": [measure_ranks(case, *often) for case in RANK_CASES],
    }
    write_result(measured, report(measured), asked.out, "kernels")


if __name__ == "__main__":
    main()
