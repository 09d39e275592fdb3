"""Do ranks hold and send what the plan says? Resident memory and bytes in the collectives.

Each layout runs in fresh processes. A small model of the same layout runs first, so that what is
measured is the tables and not the libraries. Takes some five minutes on two cores.
"""

import ctypes
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import truediv
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import shardemb as se
from benchmarks.layout_cases import (
    BATCH_SIZE,
    IDS_PER_SAMPLE,
    LAYOUTS,
    NAMES,
    NUM_NODES,
    SEQUENCES,
    TABLES,
    WORLD_SIZE,
    Mean,
    batch_of,
    workload_of,
)
from benchmarks.machine import describe
from benchmarks.ranks import GIVE_BACK_FREED, on_ranks
from benchmarks.script import listed, parser_of, write_result
from shardemb.env import Env
from shardemb.text import format_bytes, format_table


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout."""

    layout: str
    is_sequence: bool
    warmup: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is left of some steps."""

    plan: se.ShardingPlan
    model: nn.Module
    optimizer: torch.optim.Optimizer
    sent_bytes: list[float]


def train(tables: Sequence[se.TableConfig], case: Case, env: Env) -> Trained:
    """Plans, shards and trains, with the bytes that this rank sent in each step."""
    make = se.EmbeddingCollection if case.is_sequence else se.EmbeddingBagCollection
    model = Mean(make(tables))
    where = dict(zip(NAMES, LAYOUTS[case.layout], strict=True))
    plan = se.plan_sharding(model, env, where, workload=workload_of(tables))
    sharded = se.shard_modules(model, plan, env)
    optimizer = se.build_optimizer(sharded)
    sent = []
    for step in range(case.warmup + case.repeats):
        batch = batch_of(tables, seed=step * WORLD_SIZE + env.rank)
        with se.CollectiveCounter() as counter:
            optimizer.zero_grad()
            sharded(batch).backward()
            optimizer.step()
        sent.append(counter.sent_bytes)
    return Trained(plan=plan, model=sharded, optimizer=optimizer, sent_bytes=sent[case.warmup :])


def measure(env: Env, case: Case) -> dict[str, float]:
    """What the plan says of this rank, and what was measured."""
    logging.disable(logging.WARNING)
    small = [replace(table, num_embeddings=4000) for table in TABLES]
    warm = train(small, case, env)
    before = resident_bytes()
    trained = train(TABLES, case, env)
    for tensor in tensors_of([trained.model.state_dict(), trained.optimizer.state_dict()]):
        tensor.add_(0)  # state that no row needed so far is not yet resident
    resident = resident_bytes() - before
    del warm
    traffic = se.traffic_of(trained.plan)
    return {
        "planned_bytes": trained.plan.bytes_per_rank[env.rank],
        "gradient_bytes": sum(
            4 * table.num_embeddings * table.embedding_dim
            for table in trained.plan.tables
            if table.layout == "data_parallel"
        ),
        "resident_bytes": resident,
        "predicted_sent_bytes": float(traffic.sent_bytes_W[env.rank]),
        "sent_bytes": mean(trained.sent_bytes),
        "least_sent_bytes": min(trained.sent_bytes),
        "most_sent_bytes": max(trained.sent_bytes),
    }


def tensors_of(found: Any) -> Iterator[torch.Tensor]:
    """This rank's tensors in dictionaries and lists of sharded and other ones."""
    if isinstance(found, ShardedTensor):
        yield from (shard.tensor for shard in found.local_shards())
    elif isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (dict, list, tuple)):
        for item in found.values() if isinstance(found, dict) else found:
            yield from tensors_of(item)


def resident_bytes() -> int:
    """Of this process, after free memory was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def over(measured: Sequence[float], predicted: Sequence[float]) -> str:
    """The ratio that is furthest from 1."""
    ratios = [one / other for one, other in zip(measured, predicted, strict=True)]
    return f"{max(ratios, key=lambda ratio: abs(ratio - 1)):.4f}"


def spread(of: dict[str, list[float]]) -> str:
    """The least and the most that a rank sent in one step, over what was predicted."""
    predicted = of["predicted_sent_bytes"]
    least = min(map(truediv, of["least_sent_bytes"], predicted))
    most = max(map(truediv, of["most_sent_bytes"], predicted))
    return f"{least:.3f}-{most:.3f}"


def report(measured: dict[str, Any]) -> str:
    """The result as a page to read."""
    rows = []
    for result in measured["results"]:
        of = {name: [rank[name] for rank in result["ranks"]] for name in result["ranks"][0]}
        held = [sum(both) for both in zip(of["planned_bytes"], of["gradient_bytes"], strict=True)]
        rows.append(
            (
                ("sequence " if result["is_sequence"] else "") + result["layout"],
                format_bytes(max(held)),
                format_bytes(max(of["resident_bytes"])),
                over(of["resident_bytes"], held),
                format_bytes(max(of["predicted_sent_bytes"])),
                format_bytes(max(of["sent_bytes"])),
                over(of["sent_bytes"], of["predicted_sent_bytes"]),
                spread(of),
            )
        )
    header = ("layout", "planned", "resident", "ratio", "predicted", "sent", "ratio", "of steps")
    tables = ", ".join(
        f"{table.num_embeddings:,} x {table.embedding_dim} {table.dtype} "
        f"{type(table.optimizer).__name__}"
        for table in TABLES
    )
    ids = ", ".join(map(str, IDS_PER_SAMPLE.values()))
    return f"""# Memory and bytes: predicted and measured

{listed(measured["machine"])}
- {WORLD_SIZE} ranks as {NUM_NODES} nodes of {WORLD_SIZE // NUM_NODES}, gloo
- tables: {tables}
- {BATCH_SIZE} samples a rank, of each table a mean of {ids} ids, the lower ones more often
- {measured["warmup"]} steps of warm-up, {measured["repeats"]} counted
- ranks in processes of their own for each layout

"planned" is the most loaded rank's weights and optimizer state by `plan.bytes_per_rank`, and for
data_parallel tables the gradient of all rows, which stays; "resident" is what the process grew by
(RSS) when it sharded the model, trained, and every row and its state had been written once.
"predicted" and "sent" are the most that a rank sends a step: by `traffic_of(plan)` with the profile
of other batches, and as `CollectiveCounter` counts it, a mean over the steps. Ratios are measured
over predicted: of the rank where they differ most, and the range of single steps. Where the ids are
known beforehand the bytes are equal, which tests/test_traffic.py shows; these are drawn.

```
{format_table(header, rows, right=range(1, 8))}
```
"""


def main() -> None:
    """Runs all cases, prints the page and writes it with its JSON."""
    asked = parser_of(__doc__, repeats=10, warmup=3).parse_args()
    results = []
    for kind in (False, True):
        for layout in SEQUENCES if kind else LAYOUTS:
            case = Case(layout=layout, is_sequence=kind, warmup=asked.warmup, repeats=asked.repeats)
            ranks = on_ranks(measure, WORLD_SIZE, case, num_nodes=NUM_NODES, malloc=GIVE_BACK_FREED)
            results.append(asdict(case) | {"ranks": ranks})
    measured = {
        "machine": describe(),
        "warmup": asked.warmup,
        "repeats": asked.repeats,
        "results": results,
    }
    write_result(measured, report(measured), asked.out, "memory-and-bytes")


if __name__ == "__main__":
    main()
