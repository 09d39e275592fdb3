"""What do lookup, backward and update cost, beside nn.EmbeddingBag and TorchRec used directly?

Every contender trains the same tables on the same Zipf ids; contenders take turns, a step each, so
that what else the machine does falls on all of them. Loss: the mean of the pooled features. Takes
some three minutes on two cores.
"""

# B batch, D embedding_dim, N ids

import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import (
    EMBEDDING_DIM,
    FUSED,
    NUM_EMBEDDINGS,
    NUM_TABLES,
    OPTIMIZERS,
    Case,
    zipf_batches,
)
from benchmarks.contenders import TORCHREC, contenders
from benchmarks.machine import copy_gb_per_s, describe, random_row_gb_per_s
from benchmarks.ranks import on_ranks, take_turns
from benchmarks.script import listed, parser_of, write_result
from shardemb.env import Env
from shardemb.optim import SparseOptimizer
from shardemb.text import format_table

CASES = [
    Case(
        optimizer=optimizer, batch_size=batch_size, ids_per_bag=ids, layout=layout, world_size=ranks
    )
    for batch_size, ids in ((8192, 1), (2048, 20))
    for optimizer in FUSED
    for ranks, layout in ((1, "table_wise"), (2, "table_wise"), (2, "row_wise"))
    if optimizer == "RowWiseAdagrad" or ranks == 1
]


def ideal_bytes(case: Case) -> float:
    """Bytes that a step must move at least, the median over batches."""
    touched = median(
        sum(batch[name].values().unique().numel() for name in case.names)
        for batch in zipf_batches(case, Env())
    )
    num_bags = case.num_tables * case.batch_size
    return least_bytes(num_bags, case.ids_per_bag, touched, OPTIMIZERS[case.optimizer])


def least_bytes(
    num_bags: int, ids_per_bag: int, touched: float, optimizer: SparseOptimizer
) -> float:
    """Bytes that a step must move at least.

    Ids once; each touched row once for the lookup; outputs written and their gradients read; each
    touched row and its state read and written for the update.
    """
    row = 4 * EMBEDDING_DIM
    state = optimizer.state_bytes(1, EMBEDDING_DIM)
    return float(num_bags * (8 * ids_per_bag + 2 * row) + touched * (3 * row + 2 * state))


def run_rank(env: Env, warmup: int, repeats: int) -> list[dict[str, list[float]]]:
    """The times of all cases of a world size."""
    return [
        take_turns(contenders(case, env), warmup, repeats)
        for case in CASES
        if case.world_size == env.world_size
    ]


def run(warmup: int, repeats: int) -> dict[str, Any]:
    """All cases, each world size in processes of its own."""
    times_of = {
        world_size: iter(on_ranks(run_rank, world_size, warmup, repeats)[0])
        for world_size in sorted({case.world_size for case in CASES})
    }
    random_gb_per_s = random_row_gb_per_s(EMBEDDING_DIM, NUM_TABLES * NUM_EMBEDDINGS)
    results = []
    for case in CASES:
        times = next(times_of[case.world_size])
        num_bytes = ideal_bytes(case)
        results.append(
            asdict(case)
            | {
                "ms": {name: summary(of) for name, of in times.items()},
                "over_torchrec": {
                    name: median(a / b for a, b in zip(of, times[TORCHREC], strict=True))
                    for name, of in times.items()
                },
                "ideal_bytes": num_bytes,
                "ideal_ms": num_bytes / random_gb_per_s / 1e6,
            }
        )
    return {
        "machine": describe(),
        "tables": f"{NUM_TABLES} x {NUM_EMBEDDINGS:,} rows x {EMBEDDING_DIM}, float32, Zipf 1.05 "
        "ids",
        "warmup": warmup,
        "repeats": repeats,
        "copy_gb_per_s": copy_gb_per_s(),
        "random_row_gb_per_s": random_gb_per_s,
        "results": results,
    }


def summary(milliseconds: list[float]) -> dict[str, float]:
    """The median and the middle half."""
    low, middle, high = np.percentile(milliseconds, [25, 50, 75])
    return {"median": float(middle), "p25": float(low), "p75": float(high)}


def report(measured: dict[str, Any]) -> str:
    """The result as a page to read."""
    rows = []
    for result in measured["results"]:
        for name, ms in result["ms"].items():
            rows.append(
                (
                    f"{result['batch_size']:,} x {result['ids_per_bag']}",
                    result["optimizer"],
                    f"{result['world_size']} {result['layout']}",
                    name,
                    f"{ms['median']:.1f}",
                    f"{ms['p25']:.1f}-{ms['p75']:.1f}",
                    f"{result['over_torchrec'][name]:.2f}",
                    f"{result['ideal_ms']:.1f}",
                )
            )
    header = (
        "batch x ids",
        "optimizer",
        "ranks, layout",
        "",
        "ms",
        "middle half",
        "/TorchRec",
        "ideal ms",
    )
    tables = format_table(header, rows, right=(4, 6, 7))
    return f"""# Lookup, backward and update: a step

{listed(measured["machine"])}
- tables: {measured["tables"]}
- {measured["warmup"]} steps of warm-up, {measured["repeats"]} measured
- memory: copy {measured["copy_gb_per_s"]:.1f} GB/s, random rows of {4 * EMBEDDING_DIM} bytes
  {measured["random_row_gb_per_s"]:.1f} GB/s (read and written, all threads)

Contenders take turns, a step each; "/TorchRec" is the median of the ratios of steps that followed
each other. "ideal" is the least that a step must move (ids once, touched rows once for the lookup,
outputs and their gradients once, touched rows and their state twice for the update) by the
bandwidth of random rows. nn.EmbeddingBag has no row-wise Adagrad: Adagrad stands for it.
"declared order" pays for pooled features in the order of the tables, which lie on the ranks in
turn; the model reads none by position, so the others, like TorchRec, do without.

```
{tables}
```
"""


def main() -> None:
    """Runs all cases, prints the page and writes it with its JSON."""
    asked = parser_of(__doc__, repeats=30, warmup=5).parse_args()
    measured = run(asked.warmup, asked.repeats)
    write_result(measured, report(measured), asked.out, "step")


if __name__ == "__main__":
    main()
