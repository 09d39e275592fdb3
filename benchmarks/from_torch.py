"""What does a table cost that has an exchange of its own, as from_torch's have?

The same 26 tables, batches and layouts: as one collection, which makes one exchange, and as
nn.EmbeddingBags that from_torch converted, which are called one by one. Takes some two minutes on
two cores.
"""

# B batch of this rank

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import shardemb as se
from benchmarks.cases import (
    EMBEDDING_DIM,
    NUM_EMBEDDINGS,
    NUM_TABLES,
    OPTIMIZERS,
    Case,
    zipf_batches,
)
from benchmarks.contenders import loop, shardemb, some_bags
from benchmarks.machine import copy_gb_per_s, describe, random_row_gb_per_s
from benchmarks.ranks import on_ranks, take_turns
from benchmarks.script import listed, parser_of, write_result
from benchmarks.step import ideal_bytes, summary
from shardemb import layouts
from shardemb.env import Env
from shardemb.text import format_table

TOGETHER, ALONE = "one EmbeddingBagCollection", "from_torch, table by table"


def converted(case: Case, env: Env) -> tuple[nn.Module, Any]:
    """The bags, sharded as the collection is."""
    model = se.from_torch(some_bags(case, sparse=False), OPTIMIZERS[case.optimizer])
    where: dict[str, layouts.Layout] = {
        f"bags_{number}": layouts.row_wise()
        if case.layout == "row_wise"
        else layouts.table_wise(rank=number % env.world_size)
        for number in range(NUM_TABLES)
    }
    sharded = se.shard_modules(model, se.plan_sharding(model, env, where), env)
    return sharded, se.build_optimizer(sharded)


def measure(case: Case, env: Env, warmup: int, repeats: int) -> dict[str, Any]:
    """The times of both."""
    batches = zipf_batches(case, env)
    steps: dict[str, Callable[[], object]] = {
        TOGETHER: loop(*shardemb(case, env), batches),
        ALONE: loop(*converted(case, env), batches),
    }
    times = take_turns(steps, warmup, repeats)
    pairs = zip(times[ALONE], times[TOGETHER], strict=True)
    return asdict(case) | {
        "ms": {name: summary(of) for name, of in times.items()},
        "ratio": median(alone / together for alone, together in pairs),
        "ideal_bytes": ideal_bytes(case),
    }


def report(measured: dict[str, Any]) -> str:
    """The result as a page to read."""
    rows = [
        (
            f"{result['batch_size']:,} x {result['ids_per_bag']}",
            f"{result['world_size']} {result['layout']}",
            name,
            f"{ms['median']:.1f}",
            f"{ms['p25']:.1f}-{ms['p75']:.1f}",
            f"{result['ratio']:.2f}" if name == ALONE else "1.00",
            f"{result['ideal_bytes'] / measured['random_row_gb_per_s'] / 1e6:.1f}",
        )
        for result in measured["results"]
        for name, ms in result["ms"].items()
    ]
    header = ("batch x ids", "ranks, layout", "", "ms", "middle half", "ratio", "ideal ms")
    return f"""# An exchange for each table

{listed(measured["machine"])}
- tables: {NUM_TABLES} x {NUM_EMBEDDINGS:,} rows x {EMBEDDING_DIM}, float32, Zipf 1.05 ids, SGD
- {measured["warmup"]} steps of warm-up, {measured["repeats"]} measured
- memory: copy {measured["copy_gb_per_s"]:.1f} GB/s, random rows of {4 * EMBEDDING_DIM} bytes
  {measured["random_row_gb_per_s"]:.1f} GB/s (read and written)

Lookup, backward and update; batches are those of all ranks. The two take turns, a step each;
"ratio" is the median of the ratios of steps that followed each other. "ideal" is the least that a
step must move, as for step.py, by the bandwidth of random rows.

```
{format_table(header, rows, right=(3, 5, 6))}
```
"""


CASES = [
    Case(optimizer="SGD", batch_size=batch_size, ids_per_bag=ids, layout=layout, world_size=2)
    for batch_size, ids in ((512, 1), (8192, 1), (2048, 20))
    for layout in ("table_wise", "row_wise")
]


def run_rank(env: Env, warmup: int, repeats: int) -> list[dict[str, Any]]:
    """All cases on one rank."""
    return [measure(case, env, warmup, repeats) for case in CASES]


def main() -> None:
    """Measures all cases, prints the page and writes it with its JSON."""
    asked = parser_of(__doc__, repeats=30, warmup=5).parse_args()
    measured = {
        "machine": describe(),
        "warmup": asked.warmup,
        "repeats": asked.repeats,
        "results": on_ranks(run_rank, 2, asked.warmup, asked.repeats)[0],
        "copy_gb_per_s": copy_gb_per_s(),
        "random_row_gb_per_s": random_row_gb_per_s(EMBEDDING_DIM, NUM_TABLES * NUM_EMBEDDINGS),
    }
    write_result(measured, report(measured), asked.out, "from-torch")


if __name__ == "__main__":
    main()
