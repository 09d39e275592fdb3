"""What does a collective between ranks of one host cost, through shared memory and through gloo?

Both process groups take turns on the same ranks, a burst of calls each, so that a call is not
charged for the way out of the barrier before it. Takes about a minute on two cores.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import copy_gb_per_s, describe
from benchmarks.ranks import on_ranks, take_turns
from benchmarks.script import listed, parser_of, write_result
from benchmarks.step import summary
from shardemb.env import Env
from shardemb.exchange import exchange_group
from shardemb.text import format_bytes, format_table

WORLD_SIZE = 2
BURSTS = {1 << 10: 100, 1 << 20: 10, 1 << 26: 1}
"""Calls in a burst, by the bytes of a rank's tensor."""
OURS, GLOO = "shared memory", "gloo"


def calls_of(num_bytes: int, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """The collectives; a rank's input, or for all_gather its output, has that many bytes."""
    whole, other = torch.zeros(num_bytes // 4), torch.zeros(num_bytes // 4)
    part = torch.zeros(len(whole) // WORLD_SIZE)
    return {
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(other, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, src=0, group=group),
    }


def burst(call: Callable[[], object], num_calls: int) -> Callable[[], None]:
    """Some calls, one after the other."""

    def run() -> None:
        for _ in range(num_calls):
            call()

    return run


def measure(env: Env, warmup: int, repeats: int) -> list[dict[str, Any]]:
    """Microseconds of a call of each collective, in each size."""
    world = dist.group.WORLD
    assert world is not None
    groups = {OURS: exchange_group(env.device), GLOO: world}
    assert groups[OURS] is not world, "shardemb's compiled code is missing"
    found = []
    for num_bytes, num_calls in BURSTS.items():
        of_group = {name: calls_of(num_bytes, group) for name, group in groups.items()}
        for collective in of_group[OURS]:
            bursts = {name: burst(of[collective], num_calls) for name, of in of_group.items()}
            times = take_turns(bursts, warmup, repeats)
            us = {name: [1e3 * ms / num_calls for ms in of] for name, of in times.items()}
            found.append(
                {
                    "collective": collective,
                    "bytes": num_bytes,
                    "us": {name: summary(of) for name, of in us.items()},
                }
            )
    return found


def run(warmup: int, repeats: int) -> dict[str, Any]:
    """All collectives; the times are of the slower rank."""
    return {
        "machine": describe(),
        "warmup": warmup,
        "repeats": repeats,
        "copy_gb_per_s": copy_gb_per_s(),
        "results": on_ranks(measure, WORLD_SIZE, warmup, repeats)[0],
    }


def row_of(result: dict[str, Any]) -> tuple[str, ...]:
    """A line of the page."""
    ours, gloo = result["us"][OURS], result["us"][GLOO]
    cells = [f"{us['median']:,.1f} ({us['p25']:,.1f}-{us['p75']:,.1f})" for us in (ours, gloo)]
    return (
        result["collective"],
        format_bytes(result["bytes"]),
        *cells,
        f"{gloo['median'] / ours['median']:.1f}",
        f"{result['bytes'] / ours['median'] / 1e3:.2f}",
    )


def report(measured: dict[str, Any]) -> str:
    """The result as a page to read."""
    header = ("", "tensor", f"{OURS}, us", f"{GLOO}, us", "times faster", "GB/s")
    rows = [row_of(result) for result in measured["results"]]
    return f"""# Collectives between ranks of one host

{listed(measured["machine"])}
- {WORLD_SIZE} ranks, each with its share of the cores
- memory: copy {measured["copy_gb_per_s"]:.1f} GB/s (read and written, all threads)
- {measured["warmup"]} bursts of warm-up, {measured["repeats"]} measured, of \
{", ".join(str(number) for number in BURSTS.values())} calls by size

Microseconds of a call, median and middle half, of the slower rank; torch's own Python before a
collective is in both. "GB/s" is the tensor by the time in shared memory, whatever is copied how
often. The tensor is a rank's input, or the output of all_gather.

```
{format_table(header, rows, right=range(1, len(header)))}
```
"""


def main() -> None:
    """Measures all collectives, prints the page and writes it with its JSON."""
    asked = parser_of(__doc__, repeats=30, warmup=5).parse_args()
    measured = run(asked.warmup, asked.repeats)
    write_result(measured, report(measured), asked.out, "exchange")


if __name__ == "__main__":
    main()
