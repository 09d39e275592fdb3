"""What do lookup, backward and update cost, beside nn.EmbeddingBag and TorchRec used directly?

Every contender trains the same tables on the same Zipf ids; contenders take turns, a step each, so
that what else the machine does falls on all of them. Loss: the mean of the pooled features.
"""

# B batch, D embedding_dim, N ids

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchrec
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan

sys.path.insert(0, str(Path(__file__).parents[1]))

import shardemb as se
from benchmarks.machine import copy_gb_per_s, describe, random_row_gb_per_s
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.planner import Sharder
from shardemb.text import format_table

NUM_TABLES, NUM_EMBEDDINGS, EMBEDDING_DIM, LR = 26, 100_000, 64, 0.01
NAMES = [f"t{number}" for number in range(NUM_TABLES)]
TORCHREC, PIPELINE, OWN_LOOP, IN_ORDER, PLAIN = (
    "TorchRec used directly",
    "shardemb, TrainPipeline",
    "shardemb, own loop",
    "shardemb, own loop, declared order",
    "nn.EmbeddingBag(sparse=True)",
)
OPTIMIZERS: dict[str, optim.SparseOptimizer] = {
    "SGD": optim.SGD(lr=LR),
    "Adagrad": optim.Adagrad(lr=LR),
    "RowWiseAdagrad": optim.RowWiseAdagrad(lr=LR),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload."""

    optimizer: str
    batch_size: int
    ids_per_bag: int
    layout: str
    world_size: int


CASES = [
    Case(
        optimizer=optimizer, batch_size=batch_size, ids_per_bag=ids, layout=layout, world_size=ranks
    )
    for batch_size, ids in ((8192, 1), (2048, 20))
    for optimizer in OPTIMIZERS
    for ranks, layout in ((1, "table_wise"), (2, "table_wise"), (2, "row_wise"))
    if optimizer == "RowWiseAdagrad" or ranks == 1
]


class Mean(nn.Module):
    """The collection and a loss."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        """The loss."""
        values_BD: torch.Tensor = self.collection(batch).values()
        return values_BD.mean()


class Plain(nn.Module):
    """The same with nn.EmbeddingBag."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(
                NUM_EMBEDDINGS, EMBEDDING_DIM, mode="sum", sparse=True, include_last_offset=True
            )
            for _ in NAMES
        )

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        """The loss."""
        parts = [
            bag(batch[name].values(), batch[name].offsets())
            for name, bag in zip(NAMES, self.bags, strict=True)
        ]
        return torch.cat(parts, 1).mean()


def zipf_batches(case: Case, env: Env, count: int = 8) -> list[KeyedJaggedTensor]:
    """This rank's part of global batches with Zipf(1.05) ids, scattered over the rows."""
    mine = case.batch_size // env.world_size
    weights = 1 / np.arange(1, NUM_EMBEDDINGS + 1) ** 1.05
    cdf = np.cumsum(weights / weights.sum())
    batches = []
    for number in range(count):
        size = (NUM_TABLES, case.batch_size * case.ids_per_bag)
        popular = np.searchsorted(cdf, np.random.default_rng(number).random(size))
        ids = np.minimum(popular, NUM_EMBEDDINGS - 1) * 7919 % NUM_EMBEDDINGS
        first = env.rank * mine * case.ids_per_bag
        part = ids[:, first : first + mine * case.ids_per_bag]
        lengths = torch.full((NUM_TABLES * mine,), case.ids_per_bag)
        batches.append(
            KeyedJaggedTensor(keys=NAMES, values=torch.from_numpy(part.ravel()), lengths=lengths)
        )
    return batches


def ideal_bytes(case: Case) -> float:
    """Bytes that a step must move at least, the median over batches.

    Ids once; each touched row once for the lookup; outputs written and their gradients read; each
    touched row and its state read and written for the update.
    """
    row = 4 * EMBEDDING_DIM
    num_bags = NUM_TABLES * case.batch_size
    touched = median(
        sum(batch[name].values().unique().numel() for name in NAMES)
        for batch in zipf_batches(case, Env())
    )
    state = OPTIMIZERS[case.optimizer].state_bytes(1, EMBEDDING_DIM)
    ids_and_outputs = num_bags * (8 * case.ids_per_bag + 2 * row)
    return float(ids_and_outputs + touched * (3 * row + 2 * state))


Batches = list[KeyedJaggedTensor]


def loop(model: nn.Module, optimizer: Any, batches: Batches) -> Callable[[], object]:
    """A step of a plain training loop."""
    upcoming = cycle(batches)

    def step() -> None:
        optimizer.zero_grad()
        model(next(upcoming)).backward()
        optimizer.step()

    return step


def plain(case: Case, batches: list[KeyedJaggedTensor]) -> Callable[[], object]:
    """nn.EmbeddingBag with a torch optimizer; Adagrad stands for its row-wise kin."""
    model = Plain()
    make = torch.optim.SGD if case.optimizer == "SGD" else torch.optim.Adagrad
    return loop(model, make(model.parameters(), lr=LR), batches)


def torchrec_directly(case: Case, batches: Batches, env: Env) -> Callable[[], object]:
    """TorchRec as its tutorials have it."""
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=NUM_EMBEDDINGS,
                embedding_dim=EMBEDDING_DIM,
                feature_names=[name],
            )
            for name in NAMES
        ],
        device=torch.device("meta"),
    )
    config = OPTIMIZERS[case.optimizer]
    for parameter in collection.parameters():
        _apply_optimizer_in_backward(
            getattr(torchrec.optim, config.torchrec_class), [parameter], dict(vars(config))
        )
    model = Mean(collection)
    where = {
        name: row_wise(compute_kernel="fused")
        if case.layout == "row_wise"
        else table_wise(rank=number % env.world_size, compute_kernel="fused")
        for number, name in enumerate(NAMES)
    }
    plan = construct_module_sharding_plan(
        collection, where, Sharder(), env.world_size, env.world_size, "cpu"
    )
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=env.device,
        plan=ShardingPlan({"collection": plan}),
        sharders=[Sharder()],
    )
    return loop(sharded, sharded.fused_optimizer, batches)


def shardemb(case: Case, env: Env, *, declared_order: bool = False) -> tuple[nn.Module, Any]:
    """The same through shardemb."""
    tables = [
        se.TableConfig(
            name=name,
            num_embeddings=NUM_EMBEDDINGS,
            embedding_dim=EMBEDDING_DIM,
            feature_names=(name,),
            optimizer=OPTIMIZERS[case.optimizer],
        )
        for name in NAMES
    ]
    model = Mean(se.EmbeddingBagCollection(tables))
    where: dict[str, layouts.Layout] = {
        name: layouts.row_wise()
        if case.layout == "row_wise"
        else layouts.table_wise(rank=number % env.world_size)
        for number, name in enumerate(NAMES)
    }
    plan = se.plan_sharding(model, env, where)
    sharded = se.shard_modules(model, plan, env, declared_order=declared_order)
    return sharded, se.build_optimizer(sharded)


def contenders(case: Case, env: Env) -> dict[str, Callable[[], object]]:
    """A step of each."""
    batches = zipf_batches(case, env)
    steps = {TORCHREC: torchrec_directly(case, batches, env)}
    model, optimizer = shardemb(case, env)
    endless: Iterator[Any] = se.TrainPipeline(model, optimizer, env).run(cycle(batches), 10**9)
    steps[PIPELINE] = lambda: next(endless)
    steps[OWN_LOOP] = loop(*shardemb(case, env), batches)
    if case.layout == "table_wise" and env.world_size > 1:
        steps[IN_ORDER] = loop(*shardemb(case, env, declared_order=True), batches)
    if env.world_size == 1:
        steps[PLAIN] = plain(case, batches)
    return steps


def measure(case: Case, env: Env, warmup: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each step of each contender, which take turns; of the slowest rank."""
    steps = contenders(case, env)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warmup + repeats):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if repeat >= warmup:
                seconds[name].append(1e3 * float(taken))
    return seconds


def run_rank(rank: int, world_size: int, port: int, out: str, warmup: int, repeats: int) -> None:
    """All cases of a world size on one rank; rank 0 writes the times."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    env = se.init_distributed(device="cpu")
    for number, case in enumerate(CASES):
        if case.world_size != world_size:
            continue
        times = measure(case, env, warmup, repeats)
        if env.is_main:
            Path(out, f"{number}.json").write_text(json.dumps(times))


def run(warmup: int, repeats: int, out: Path) -> dict[str, Any]:
    """All cases, each world size in processes of its own."""
    # glibc reads these when a process starts; without them each step pays for page faults
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    for world_size in sorted({case.world_size for case in CASES}):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(run_rank, (world_size, port, str(out), warmup, repeats), nprocs=world_size)
    random_gb_per_s = random_row_gb_per_s(EMBEDDING_DIM, NUM_TABLES * NUM_EMBEDDINGS)
    results = []
    for number, case in enumerate(CASES):
        times = json.loads((out / f"{number}.json").read_text())
        (out / f"{number}.json").unlink()
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
    machine = "\n".join(f"- {name}: {value}" for name, value in measured["machine"].items())
    tables = format_table(header, rows, right=(4, 6, 7))
    return f"""# Lookup, backward and update: a step

{machine}
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=30)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    measured = run(asked.warmup, asked.repeats, asked.out)
    page = report(measured)
    name = f"{measured['machine']['date']}-step"
    (asked.out / f"{name}.json").write_text(json.dumps(measured, indent=1) + "\n")
    (asked.out / f"{name}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
