"""How long does a plan take, in how much memory, how good is it, beside TorchRec's own planner?

Plans for nodes of 8 H100s without any of them. Each case runs in a process of its own, so that its
peak of memory is its own; a planner that takes longer than its limit, or dies, is not tried on
anything larger. Takes some five minutes on two cores.
"""

import logging
import multiprocessing
import resource
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import shardemb as se
from benchmarks.machine import describe
from benchmarks.script import listed, parser_of, write_result
from benchmarks.torchrec_planner import of_plan, rated_ms, some_tables, torchrec_placed
from shardemb import layouts, optim
from shardemb.layouts import Layout
from shardemb.text import format_table

NUM_TABLES = (20, 100, 1000)
NUM_RANKS = (8, 64, 1024)
FREE, NAMED, TORCHREC = "all free", "a third named", "TorchRec's planner"
MOST_SHARDS_TO_RATE = 100_000
SMALL_TABLE_ROWS = 1 << 20
OUR_LIMIT = 10
"""The limit for all plans of a case, over the one for TorchRec's."""
MOST_ROWS = 1e8
FILLED = 0.25
"""The part of all memory that the tables fill, where they are many."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One planner for some tables on some ranks."""

    planner: str
    num_tables: int
    num_ranks: int

    def is_as_large_as(self, other: "Case") -> bool:
        """Whether it is the same planner's, for at least as many tables and ranks."""
        return (
            self.planner == other.planner
            and self.num_tables >= other.num_tables
            and self.num_ranks >= other.num_ranks
        )


def names(model: Any, num_ranks: int) -> dict[str, Layout]:
    """Every third table: row-wise where it is large, else on a rank."""
    return {
        config.name: layouts.row_wise()
        if config.num_embeddings > SMALL_TABLE_ROWS
        else layouts.table_wise(rank=i % num_ranks)
        for i, config in enumerate(model.embedding_bag_configs())
        if i % 3 == 0
    }


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Seconds, bytes, and how busy the busiest rank would be."""
    cluster = se.Cluster.preset("h100", num_nodes=case.num_ranks // 8)
    # of widths of 120 columns in the mean, and rows that spread evenly by their logarithms
    mean_rows = FILLED * case.num_ranks * cluster.memory_bytes / (480 * case.num_tables)
    model, workload = some_tables(
        case.num_tables, 0, optim.SGD(lr=0.1), most_rows=min(MOST_ROWS, 8 * mean_rows)
    )
    named = names(model, case.num_ranks) if case.planner == NAMED else {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    placed, num_bytes = {}, []
    for _ in range(1 if case.planner == TORCHREC else repeats):
        start = time.perf_counter()
        if case.planner == TORCHREC:
            placed = torchrec_placed(model, cluster, workload)
        else:
            plan = se.plan_sharding(model, cluster, named, workload=workload)
            placed, num_bytes = of_plan(plan), plan.bytes_per_rank
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_shards = sum(len(of.ranks) for of in placed.values())
    rated = num_shards <= MOST_SHARDS_TO_RATE
    return asdict(case) | {
        "seconds": sorted(seconds),
        "added_mib": (peak - before) / 1024,
        "peak_mib": peak / 1024,
        "num_shards": num_shards,
        "busiest_rank_ms": rated_ms(model, cluster, workload, placed) if rated else None,
        "most_over_mean_bytes": max(num_bytes) * len(num_bytes) / sum(num_bytes)
        if num_bytes
        else None,
    }


def run_case(pipe: Connection, case: Case, repeats: int) -> None:
    """Measures in a process of its own."""
    logging.disable(logging.WARNING)
    pipe.send(measure(case, repeats))
    pipe.close()


def in_own_process(case: Case, repeats: int, limit_s: float) -> dict[str, Any]:
    """What a case measures, or why it did not end: then it has no seconds."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=run_case, args=(there, case, repeats), daemon=True)
    process.start()
    there.close()
    nothing = asdict(case) | {"seconds": []}
    try:
        return here.recv() if here.poll(limit_s) else nothing | {"why": f"over {limit_s:g}"}
    except EOFError:
        process.join()
        return nothing | {"why": f"died ({process.exitcode})"}
    finally:
        process.kill()
        process.join()


def run(repeats: int, limit_s: float) -> dict[str, Any]:
    """Measures every case."""
    results: list[dict[str, Any]] = []
    given_up: list[Case] = []
    for num_ranks in NUM_RANKS:
        for num_tables in NUM_TABLES:
            for planner in (FREE, NAMED, TORCHREC):
                case = Case(planner=planner, num_tables=num_tables, num_ranks=num_ranks)
                if any(case.is_as_large_as(other) for other in given_up):
                    continue
                limit = limit_s if planner == TORCHREC else OUR_LIMIT * limit_s
                results.append(in_own_process(case, repeats, limit))
                if not results[-1]["seconds"]:
                    given_up.append(case)
                print(results[-1], file=sys.stderr, flush=True)
    return {
        "machine": describe(),
        "repeats": repeats,
        "torchrec_limit_s": limit_s,
        "results": results,
    }


def report(measured: dict[str, Any]) -> str:
    """The result as a page to read."""
    rows = [
        (
            f"{result['num_tables']:,}",
            f"{result['num_ranks']:,}",
            result["planner"],
            f"{median(times):.2f}" if (times := result["seconds"]) else result["why"],
            f"{times[0]:.2f}-{times[-1]:.2f}" if len(times) > 1 else "",
            f"{result['added_mib']:.0f}" if times else "",
            f"{result['peak_mib']:.0f}" if times else "",
            f"{result['num_shards']:,}" if times else "",
            f"{ms:.3g}" if (ms := result.get("busiest_rank_ms")) else "",
            f"{most:.2f}" if (most := result.get("most_over_mean_bytes")) else "",
        )
        for result in measured["results"]
    ]
    header = (
        *("tables", "ranks", "", "s", "least-most", "MiB", "in all", "shards"),
        *("busiest ms", "most/mean"),
    )
    theirs = measured["torchrec_limit_s"]
    ours = OUR_LIMIT * theirs
    table = format_table(header, rows, right=(0, 1, 3, 4, 5, 6, 7, 8, 9))
    return f"""# What a plan takes: time, memory, and how good it is

{listed(measured["machine"])}
- planned for nodes of 8 H100s, tables with SGD of 32 to 256 columns, 1,000 rows or more: at most
  {MOST_ROWS:,.0f}, or as many as fill a fifth to a quarter of all memory; 1,024 samples a rank with
  1 to 50 ids a feature
- shardemb: {measured["repeats"]} plans in one process, ended after {ours:g} s; TorchRec: one, ended
  after {theirs:g} s, the start of the process and the rating among them; neither is tried on
  anything larger after that

"over" gives that limit in seconds, "died" the exit code of the process. "MiB" is what planning adds
to the peak of the process, "in all" that peak, with torch and TorchRec loaded. "busiest ms" is
TorchRec's own estimate of every shard, added up for the busiest rank, where there are not more than
{MOST_SHARDS_TO_RATE:,} shards: the less the better; it cannot be compared where layouts are named.
"most/mean" is bytes of tables on the fullest rank over the mean: time is balanced, memory only kept
within its limit. TorchRec may choose among the same layouts, and splits columns into slices of 128
only.

```
{table}
```
"""


def main() -> None:
    """Runs all cases, prints the page and writes it with its JSON."""
    parser = parser_of(__doc__, repeats=3)
    parser.add_argument(
        "--torchrec-limit-s",
        type=float,
        default=30.0,
        help=f"when TorchRec's planner is ended, shardemb's plans after {OUR_LIMIT} times that "
        "(default: %(default)s)",
    )
    asked = parser.parse_args()
    measured = run(asked.repeats, asked.torchrec_limit_s)
    write_result(measured, report(measured), asked.out, "plan")
    died = [result for result in measured["results"] if result.get("why", "").startswith("died")]
    if died:
        sys.exit(f"cases died, their errors are above: {died}")


if __name__ == "__main__":
    main()
