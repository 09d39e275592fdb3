"""Is a kernel by numba as good as one in C: how fast is it, and what does it cost to have it?

The kernel is a pooled sum, and row-wise Adagrad of merged rows. Both take the same ids and train
rows that start alike; calls take turns. Numba is no part of shardemb: install it beside it to run
this. Takes a minute on two cores.
"""

# D embedding_dim, Q bags of all tables, R rows of all tables

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

try:
    import numba
except ModuleNotFoundError:
    sys.exit("numba is not there; install it beside shardemb to run this: pip install numba")

from benchmarks.bare_kernel import State, Tables, bags_of
from benchmarks.cases import EMBEDDING_DIM, LR, Case, zipf_batches
from benchmarks.machine import describe, timed
from benchmarks.numba_kernel import look_up, update
from benchmarks.script import listed, parser_of, write_result
from benchmarks.step import summary
from benchmarks.teams import REST_S
from shardemb.allocator import keep_freed_memory
from shardemb.env import Env
from shardemb.huge_pages import advise_huge
from shardemb.native import kernels, library
from shardemb.text import format_table

CASES = [
    Case(optimizer="RowWiseAdagrad", batch_size=batch_size, ids_per_bag=ids)
    for batch_size, ids in ((8192, 1), (2048, 20))
]
NUMBA_STARTS = """
import time, numpy, torch
begin = time.perf_counter()
from benchmarks.numba_kernel import look_up, update
imported = time.perf_counter()
rows, ids = numpy.ones((9, 64), numpy.float32), numpy.arange(9)
look_up(rows, ids, numpy.arange(10), rows.copy(), 1)
update(rows, rows[:, 0].copy(), ids, numpy.arange(10), rows.copy(), numpy.float32(1), 1)
print(imported - begin, time.perf_counter() - imported)
"""
C_STARTS = """
import time, torch
begin = time.perf_counter()
from shardemb.native.library import library
library()
print(time.perf_counter() - begin)
"""


def seconds_of(script: str, cache: str) -> list[float]:
    """What a new process says."""
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    command = [sys.executable, "-c", f"import sys; sys.path = {sys.path!r}\n{script}"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(word) for word in said.stdout.split()]


def to_have() -> dict[str, float]:
    """What each costs before it does anything."""
    with tempfile.TemporaryDirectory() as cache:
        imported, compiled = seconds_of(NUMBA_STARTS, cache)
        _, cached = seconds_of(NUMBA_STARTS, cache)
        (loaded,) = seconds_of(C_STARTS, cache)
    files = [
        Path(file.locate()) for name in ("numba", "llvmlite") for file in metadata.files(name) or ()
    ]
    built = Path(library.__file__).parent.glob("_level*so")
    return {
        "numba, installed MB": sum(file.stat().st_size for file in files if file.exists()) / 1e6,
        "numba, import s": imported,
        "numba, first calls s, nothing cached": compiled,
        "numba, first calls s, from its cache": cached,
        "C, installed MB, all levels": sum(path.stat().st_size for path in built) / 1e6,
        "C, load s": loaded,
    }


class ByC:
    """shardemb's kernels."""

    def __init__(self, case: Case) -> None:
        self.tables, self.state = Tables(case), State(case)
        self.merged = kernels.Merged(self.tables.blocks)

    def look_up(self, bags: kernels.Bags) -> object:
        """Sums of rows."""
        return self.tables.blocks.look_up(bags)

    def update(self, bags: kernels.Bags, grad: torch.Tensor) -> object:
        """Trains the rows."""
        self.merged.sort([(bags, grad)])
        return self.merged.update(self.state.trainings())

    @property
    def rows(self) -> torch.Tensor:
        """Of all tables [R, D]."""
        return torch.cat(self.tables.weights)


class ByNumba:
    """The same by numba, whose tables follow one another."""

    def __init__(self, case: Case) -> None:
        self.num_tables, self.rows = case.num_tables, ByC(case).rows
        advise_huge(self.rows)
        self.weight_RD, self.state_R = self.rows.numpy(), np.zeros(len(self.rows), np.float32)

    def look_up(self, bags: kernels.Bags) -> object:
        """Sums of rows."""
        ids_N, offsets = bags.ids_N.numpy(), bags.offsets.numpy()
        pooled_QD = np.empty((len(offsets) - 1, EMBEDDING_DIM), np.float32)
        return look_up(self.weight_RD, ids_N, offsets, pooled_QD, self.num_tables)

    def update(self, bags: kernels.Bags, grad: torch.Tensor) -> object:
        """Trains the rows."""
        tables = (self.weight_RD, self.state_R, bags.ids_N.numpy(), bags.offsets.numpy())
        return update(
            *tables, grad.numpy().reshape(-1, EMBEDDING_DIM), np.float32(LR), self.num_tables
        )


def measure(case: Case, warmup: int, repeats: int) -> dict[str, Any]:
    """Times of lookup and update by each, and how far apart their rows are afterwards."""
    trainers: dict[str, ByC | ByNumba] = {"C": ByC(case), "numba": ByNumba(case)}
    grad = torch.randn(case.batch_size, case.num_tables * EMBEDDING_DIM)
    batches = zipf_batches(case, Env())
    times = {(what, by): list[float]() for what in ("look_up", "update") for by in trainers}
    for repeat in range(warmup + repeats):
        bags = bags_of(batches[repeat % len(batches)])
        for (what, by), of in times.items():
            act = partial(getattr(trainers[by], what), bags, *([grad] if what == "update" else []))
            time.sleep(REST_S)
            taken = 1e3 * timed(act)
            if repeat >= warmup:
                of.append(taken)
    return {
        "batch": f"{case.batch_size:,} x {case.ids_per_bag}",
        "rows_differ_by": float((trainers["C"].rows - trainers["numba"].rows).abs().max()),
        "ms": {f"{what} by {by}": summary(of) for (what, by), of in times.items()},
        "over_c": {
            f"{what} by {by}": median(a / b for a, b in zip(of, times[what, "C"], strict=True))
            for (what, by), of in times.items()
        },
    }


def report(measured: dict[str, Any]) -> str:
    """The result as a page to read."""
    rows = [
        (
            result["batch"],
            name,
            f"{ms['median']:.1f}",
            f"{ms['p25']:.1f}-{ms['p75']:.1f}",
            f"{result['over_c'][name]:.2f}",
        )
        for result in measured["results"]
        for name, ms in result["ms"].items()
    ]
    table = format_table(("batch x ids", "", "ms", "middle half", "/C"), rows, right=(2, 4))
    to_have = format_table(
        ("", ""),
        [(name, f"{value:.2f}") for name, value in measured["to_have"].items()],
        right=(1,),
    )
    apart = max(result["rows_differ_by"] for result in measured["results"])
    return f"""# Numba beside C

{listed(measured["machine"])}
- {measured["warmup"]} turns of warm-up, {measured["repeats"]} measured
- 26 tables x 100,000 rows x {EMBEDDING_DIM}, float32, Zipf 1.05 ids, RowWiseAdagrad

Calls take turns; "/C" is the median of the ratios of calls that followed each other. Freed memory
is used again, and rows lie on huge pages, for both. Numba runs on the threading layer
"{measured["threading_layer"]}", C on torch's threads. Rows of both differ by {apart:.1g} at most.

```
{table}
```

What it takes to have them, by a new process that imported torch; the first calls of numba are a
lookup and an update of a few rows, for float32 rows, int64 ids and one optimizer alone: each other
type and optimizer is compiled for itself.

```
{to_have}
```

What a kernel needs beside: numba has no prefetch, which is written here as an instruction of LLVM;
it has neither float16 arithmetic on CPU nor bfloat16; a loop that may raise runs on one thread; and
its threads are others than torch's, so that a process has twice as many.
"""


def main() -> None:
    """Measures all, prints the page and writes it with its JSON."""
    asked = parser_of(__doc__, repeats=30, warmup=8).parse_args()
    keep_freed_memory(os.environ)
    numba.set_num_threads(torch.get_num_threads())
    measured = {
        "machine": describe() | {"numba": metadata.version("numba")},
        "warmup": asked.warmup,
        "repeats": asked.repeats,
        "results": [measure(case, asked.warmup, asked.repeats) for case in CASES],
        "threading_layer": numba.threading_layer(),
        "to_have": to_have(),
    }
    write_result(measured, report(measured), asked.out, "numba-beside-c")


if __name__ == "__main__":
    main()
