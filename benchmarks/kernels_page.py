"""The page of `kernels.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cases import EMBEDDING_DIM
from benchmarks.forward_contenders import GATHER, LONG
from benchmarks.kernel_contenders import CONTENDERS
from benchmarks.kernel_targets import AS_INSTALLED, KEPT, batch_of, reached, tables_of
from benchmarks.script import listed
from shardemb.text import format_table


def report(measured: Mapping[str, Any]) -> str:
    """The result as a page to read."""
    return f"""# CPU kernels

{listed(measured["machine"])}
- {measured["warmup"]} steps of warm-up, {measured["repeats"]} measured; times are medians
- memory: copy {measured["copy_gb_per_s"]:.1f} GB/s, random rows of {4 * EMBEDDING_DIM} bytes
  {measured["random_read_gb_per_s"]:.1f} GB/s read by all threads, see below

All train float32 tables of width {EMBEDDING_DIM}, whose rows all start alike, on the same Zipf 1.05
ids. The loss is the mean of the pooled features; "the loss alone" is what it costs with its
gradient, and is in all times. Contenders take turns, a step each. "{AS_INSTALLED}": memory is
allocated as the C library does by itself; "{KEPT}": freed memory is used again, as shardemb has
it. nn.EmbeddingBag has no row-wise Adagrad: Adagrad stands for it; its Adam is SparseAdam. The bare
kernel has its rows on huge pages, and is called without TorchRec, autograd or an optimizer.

## A step on one rank

"/shardemb" is how many times as long as shardemb's own loop, the median of the ratios of steps that
followed each other. "ideal" is the least that a step must move (ids once, touched rows once for the
lookup, outputs and their gradients once, touched rows and their state twice for the update) by the
bandwidth of random rows.

{_steps(measured)}

## The lookup alone

8 tables of 1,000,000 rows, {KEPT}. "GB/s" counts the bytes of the rows that are read, not
what is written. What memory gives, {measured["random_read_gb_per_s"]:.1f} GB/s, is the most
that any of these reached with bags of {LONG:,} uniform ids, where next to nothing is written, or
{GATHER} with what it writes. With Zipf ids many rows are in the cache.

{_forward(measured)}

## Two ranks

A share of the threads each, beside one rank with all of them; RowWiseAdagrad, 26 tables of 100,000
rows; the batch is that of all ranks. "of one rank": samples/s over those of the same contender on
one rank, by steps that followed each other.

{_ranks(measured["ranks"])}

## Targets

"reached" by shardemb's sharded model with {KEPT} for all, "as installed" beside others whose memory
is allocated as the C library does by itself, "bare" by shardemb's bare kernel with {KEPT} for all.

{_targets(measured)}
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    return f"```\n{format_table(header, rows, right=right)}\n```"


def _steps(measured: Mapping[str, Any]) -> str:
    """A table for each workload."""
    rows_of = dict[str, list[tuple[str, ...]]]()
    for result in measured["steps"]:
        workload = f"{tables_of(result)}, batch x ids {batch_of(result)}"
        ideal_ms = result["ideal_bytes"] / measured["random_read_gb_per_s"] / 1e6
        found = {(of["contender"], of["setting"]): of for of in result["contenders"]}
        rows_of.setdefault(workload, []).extend(
            (
                result["optimizer"],
                name,
                *_times(found.get((name, AS_INSTALLED))),
                *_times(found[name, KEPT]),
                f"{ideal_ms:.1f}",
            )
            for name in CONTENDERS
            if (name, KEPT) in found
        )
    header = (
        "optimizer",
        "",
        f"ms {AS_INSTALLED}",
        "middle half",
        "/shardemb",
        f"ms {KEPT}",
        "middle half",
        "/shardemb",
        "ideal ms",
    )
    return "\n\n".join(
        f"{workload}:\n\n{_table(header, rows, (2, 4, 5, 7, 8))}"
        for workload, rows in rows_of.items()
    )


def _times(found: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    return *_spread(found["ms"]), f"{found['over_shardemb']:.2f}"


def _spread(ms: Mapping[str, float]) -> tuple[str, str]:
    return f"{ms['median']:.1f}", f"{ms['p25']:.1f}-{ms['p75']:.1f}"


def _forward(measured: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{of['ids']} x {of['ids_per_bag']:,}",
            of["contender"],
            *_spread(of["ms"]),
            f"{of['gb_per_s']:.1f}",
            f"{of['gb_per_s'] / measured['random_read_gb_per_s']:.0%}",
        )
        for of in measured["forward"]
    ]
    return _table(("ids", "", "ms", "middle half", "GB/s", "of memory"), rows, (2, 4, 5))


def _ranks(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            batch_of(result),
            result["layout"],
            of["team"],
            of["contender"],
            *_spread(of["ms"]),
            f"{of['samples_per_s']:,.0f}",
            f"{of['of_one_rank']:.0%}",
        )
        for result in results
        for of in result["contenders"]
    ]
    header = (
        "batch x ids",
        "layout",
        "",
        "",
        "ms",
        "middle half",
        "samples/s",
        "of one rank",
    )
    return _table(header, rows, (4, 6, 7))


def _targets(measured: Mapping[str, Any]) -> str:
    rows = [
        (
            of.target,
            of.where,
            f"{'at most' if of.at_most else 'at least'} {of.asked:g}",
            f"{of.reached:.2f}",
            "yes" if of.met else "no",
            "" if of.installed is None else f"{of.installed:.2f}",
            "" if of.bare is None else f"{of.bare:.2f}",
        )
        for of in reached(measured)
    ]
    header = ("target", "where", "asked", "reached", "met", "as installed", "bare")
    return _table(header, rows, (3, 5, 6))
