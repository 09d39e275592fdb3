"""Does the time of a step depend on the vocabulary?

One table of 10^4 to 10^7 rows, by shardemb on one rank, by nn.EmbeddingBag with sparse gradients,
and with dense ones, whose steps pass over all rows. Contenders of a kind of optimizer take turns, a
step each; who does not fit in memory beside those before it is left out. Takes some two minutes
and 16 GB on two cores.
"""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import EMBEDDING_DIM, Batches
from benchmarks.contenders import loop
from benchmarks.machine import copy_gb_per_s, describe, random_row_gb_per_s
from benchmarks.memory_and_bytes import resident_bytes, tensors_of
from benchmarks.one_table import (
    ADAGRAD,
    ADAM,
    ALL,
    BATCH_SIZE,
    GROUPS,
    IDS_PER_BAG,
    ROW,
    ROW_WISE,
    SAME,
    VOCABULARIES,
    Contender,
    batches_of,
)
from benchmarks.ranks import on_ranks, take_turns
from benchmarks.script import listed, parser_of, write_result
from benchmarks.step import least_bytes, summary
from shardemb.env import Env
from shardemb.host_memory import host_memory_bytes
from shardemb.text import format_bytes, format_table

WARM = 20_000
"""Rows of tables that are trained first, so that what is measured is not the libraries."""
FILLED = 0.85
"""The part of memory that contenders may fill together."""


def those_that_fit(group: str, num_embeddings: int) -> dict[str, Contender]:
    """The contenders whose tables fit in memory together."""
    left = FILLED * host_memory_bytes()
    found = {}
    for name, contender in GROUPS[group].items():
        needed = contender.row_bytes * num_embeddings
        if needed <= left:
            found[name] = contender
            left -= needed
    return found


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of the tensors that stay: weights, state and dense gradients."""
    tensors = list(tensors_of([model.state_dict(), optimizer.state_dict()]))
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    tensors += [grad for grad in grads if not grad.is_sparse]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def measure(
    env: Env, num_embeddings: int, group: str, warmup: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Memory and times of the contenders of a group that fit."""
    batches = {ids: batches_of(num_embeddings, ids) for ids in (SAME, ALL)}
    models, found = {}, dict[str, dict[str, Any]]()
    for name, contender in those_that_fit(group, num_embeddings).items():
        before = resident_bytes()
        models[name] = contender.make(num_embeddings, env)
        step = loop(*models[name], batches[ALL])
        for _ in range(2):
            step()
        found[name] = {
            "held_bytes_per_row": held_bytes(*models[name]) / num_embeddings,
            "peak_bytes_per_row": (peak_bytes() - before) / num_embeddings,
        }
    for ids, of in batches.items():
        times = take_turns(
            {name: loop(*trained, of) for name, trained in models.items()}, warmup, repeats
        )
        for name, milliseconds in times.items():
            pairs = zip(milliseconds, times[group], strict=True)
            found[name][ids] = summary(milliseconds) | {"ratio": median(a / b for a, b in pairs)}
    return found


def peak_bytes() -> int:
    """The most memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_rank(
    env: Env, num_embeddings: int, group: str, warmup: int, repeats: int
) -> dict[str, Any]:
    """A group in one vocabulary, after one in a small one."""
    measure(env, WARM, group, 0, 1)
    return measure(env, num_embeddings, group, warmup, repeats)


def run(warmup: int, repeats: int) -> dict[str, Any]:
    """All vocabularies, each group in a process of its own, whose peak of memory is its own."""
    results = []
    for num_embeddings in VOCABULARIES:
        found: dict[str, Any] = {}
        for group in GROUPS:
            found |= on_ranks(run_rank, 1, num_embeddings, group, warmup, repeats)[0]
        random_gb_per_s = random_row_gb_per_s(EMBEDDING_DIM, num_embeddings)
        results.append(
            {
                "num_embeddings": num_embeddings,
                "contenders": found,
                "random_row_gb_per_s": random_gb_per_s,
                "ids": {
                    ids: ideal(batches_of(num_embeddings, ids), random_gb_per_s)
                    for ids in (SAME, ALL)
                },
            }
        )
    return {
        "machine": describe(),
        "warmup": warmup,
        "repeats": repeats,
        "copy_gb_per_s": copy_gb_per_s(),
        "results": results,
    }


def ideal(batches: Batches, random_gb_per_s: float) -> dict[str, Any]:
    """The rows that a step touches, the median, and how long what it must move takes."""
    touched = median(batch.values().unique().numel() for batch in batches)
    return {
        "touched_rows": touched,
        "ms": {
            type(of).__name__: least_bytes(BATCH_SIZE, IDS_PER_BAG, touched, of)
            / random_gb_per_s
            / 1e6
            for of in (ADAM, ADAGRAD, ROW_WISE)
        },
    }


def report(measured: dict[str, Any]) -> str:
    """The result as a page to read."""
    results = measured["results"]
    header = ("", *(f"{result['num_embeddings']:,}" for result in results))
    sections = []
    for ids in (SAME, ALL):
        rows = [("touched rows", *(f"{of['ids'][ids]['touched_rows']:,.0f}" for of in results))]
        for group, contenders in GROUPS.items():
            rows += [(name, *cells(name, ids, results)) for name in contenders]
            for kind in {type(of.of).__name__: None for of in contenders.values()}:
                ideals = (f"{of['ids'][ids]['ms'][kind]:.1f}" for of in results)
                rows.append((f"ideal {kind}", *ideals))
            rows += [
                (f"{name} / {group}", *ratios(name, ids, results))
                for name in contenders
                if name != group
            ]
        sections.append(f"{ids.capitalize()}:\n\n{table(header, rows)}")
    times = "\n\n".join(sections)
    random = ", ".join(f"{result['random_row_gb_per_s']:.1f}" for result in results)
    return f"""# A step and the vocabulary

{listed(measured["machine"])}
- one table of width {EMBEDDING_DIM}, float32, on one rank
- batches of {BATCH_SIZE:,} bags of {IDS_PER_BAG} ids, Zipf 1.05
- {measured["warmup"]} steps of warm-up, {measured["repeats"]} measured
- memory: copy {measured["copy_gb_per_s"]:.1f} GB/s, random rows of {ROW} bytes {random} GB/s, of
  tables of those rows (read and written, all threads)

Milliseconds of lookup, backward and update by the rows of the table, median and middle half.
Contenders of a kind of optimizer take turns, a step each; ratios are medians of those of steps that
followed each other. torch's are of nn.EmbeddingBag. "ideal" is the least that a step must move, as
for step.py, by the bandwidth of random rows of such a table: smaller ones are in the cache. With
"the same rows", ids are of 10,000 rows that are spread over the table, so that only the vocabulary
differs; with those of all rows, a larger vocabulary has more rows that a batch touches.

{times}

Memory, bytes for each row of the table. "held" is what stays: weights, optimizer state, and the
gradient where it is dense; "peak" is what the process grew by at most, while it made the table and
took steps.

{memory(results)}
"""


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table of a column for each vocabulary."""
    return f"```\n{format_table(header, rows, right=range(1, len(header)))}\n```"


def cells(name: str, ids: str, results: list[dict[str, Any]]) -> list[str]:
    """The times of a contender in each vocabulary, or why there are none."""
    found = []
    for result in results:
        if name in result["contenders"]:
            ms = result["contenders"][name][ids]
            found.append(f"{ms['median']:.1f} ({ms['p25']:.1f}-{ms['p75']:.1f})")
        else:
            row_bytes = next(of[name].row_bytes for of in GROUPS.values() if name in of)
            found.append(f"needs {format_bytes(row_bytes * result['num_embeddings'])}")
    return found


def ratios(name: str, ids: str, results: list[dict[str, Any]]) -> list[str]:
    """How its steps compare with those of torch's sparse optimizer before them."""
    of = [result["contenders"].get(name) for result in results]
    return ["" if found is None else f"{found[ids]['ratio']:.2f}" for found in of]


def memory(results: list[dict[str, Any]]) -> str:
    """Bytes for each row, in the largest vocabulary that a contender had."""
    rows = []
    for name in (name for group in GROUPS.values() for name in group):
        largest = next(result for result in reversed(results) if name in result["contenders"])
        of = largest["contenders"][name]
        rows.append(
            (
                name,
                f"{largest['num_embeddings']:,}",
                f"{of['held_bytes_per_row']:.0f}",
                f"{of['peak_bytes_per_row']:.0f}",
            )
        )
    return table(("", "rows", "held", "peak"), rows)


def main() -> None:
    """Measures all vocabularies, prints the page and writes it with its JSON."""
    asked = parser_of(__doc__, repeats=30, warmup=5).parse_args()
    measured = run(asked.warmup, asked.repeats)
    write_result(measured, report(measured), asked.out, "vocabulary")


if __name__ == "__main__":
    main()
