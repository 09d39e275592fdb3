"""What the CPU kernels shall reach, and what they reached in a run. Measures nothing."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.contenders import OWN_LOOP, PIPELINE, PLAIN, TORCHREC
from benchmarks.forward_contenders import UNIFORM
from benchmarks.kernel_contenders import BARE, FBGEMM

AS_INSTALLED, KEPT = "as installed", "memory kept"
"""How the C library allocates: as it does by default, or as shardemb has it."""
ONE_RANK, TWO_RANKS, TWO_INSTALLED = "1 rank", "2 ranks", "2 ranks, as installed"
FASTER = {
    "SGD": (FBGEMM, 5.0),
    "Adagrad": (FBGEMM, 5.0),
    "RowWiseAdagrad": (FBGEMM, 2.5),
    "Adam": (PLAIN, 8.0),
}
"""How many times as fast as whom a step shall be."""
OTHERS = (FBGEMM, TORCHREC, PLAIN)
"""What a user would take instead."""
FORWARD, OVER_BARE, OF_ONE_RANK = 0.8, 1.3, 0.8


class Reached(NamedTuple):
    """A target and what was reached.

    Attributes:
        target: What shall be.
        where: In which workload.
        asked: The bound.
        reached: By shardemb's sharded model, memory kept for all.
        at_most: Whether the bound is an upper one.
        installed: The same beside others as they are installed, where that is another thing.
        bare: By shardemb's bare kernel, memory kept for all.
    """

    target: str
    where: str
    asked: float
    reached: float
    at_most: bool = False
    installed: float | None = None
    bare: float | None = None

    @property
    def met(self) -> bool:
        """Whether the sharded model reached it with memory kept for all."""
        return self.reached <= self.asked if self.at_most else self.reached >= self.asked


def reached(measured: Mapping[str, Any]) -> Iterator[Reached]:
    """All targets."""
    for result in measured["steps"]:
        yield from _of_steps(result)
    gb_per_s = {
        (of["ids_per_bag"], of["contender"]): of["gb_per_s"] / measured["random_read_gb_per_s"]
        for of in measured["forward"]
        if of["ids"] == UNIFORM
    }
    for ids_per_bag in (20, 50):
        yield Reached(
            target="lookup / what memory gives",
            where=f"{ids_per_bag} ids a bag",
            asked=FORWARD,
            reached=gb_per_s[ids_per_bag, OWN_LOOP],
            bare=gb_per_s[ids_per_bag, BARE],
        )
    for result in measured["ranks"]:
        ratios = {(of["team"], of["contender"]): of["of_one_rank"] for of in result["contenders"]}
        yield Reached(
            target="samples/s of two ranks / of one",
            where=f"{batch_of(result)}, {result['layout']}",
            asked=OF_ONE_RANK,
            reached=ratios[TWO_RANKS, OWN_LOOP],
        )


def _of_steps(result: Mapping[str, Any]) -> Iterator[Reached]:
    """Those of a step; what was not in the round of the bare kernel meets it by the common one."""
    slower = {(of["setting"], of["contender"]): of["over_shardemb"] for of in result["contenders"]}
    bare, where = slower[KEPT, BARE], f"{tables_of(result)}, {batch_of(result)}"
    other, asked = FASTER[result["optimizer"]]
    best = {
        setting: min(slower[setting, name] for name in OTHERS if (setting, name) in slower)
        for setting in (KEPT, AS_INSTALLED)
    }
    yield Reached(
        target=f"{result['optimizer']}: {other} / shardemb",
        where=where,
        asked=asked,
        reached=slower[KEPT, other],
        installed=slower[AS_INSTALLED, other],
        bare=slower[KEPT, other] / bare,
    )
    yield Reached(
        target=f"{result['optimizer']}: the best other / shardemb",
        where=where,
        asked=1.0,
        reached=best[KEPT],
        installed=best[AS_INSTALLED],
        bare=best[KEPT] / bare,
    )
    if result["batch_size"] == 8192:
        for name in (OWN_LOOP, PIPELINE):
            yield Reached(
                target=f"{result['optimizer']}: {name} / bare kernel",
                where=where,
                asked=OVER_BARE,
                reached=slower[KEPT, name] / bare,
                at_most=True,
            )


def tables_of(result: Mapping[str, Any]) -> str:
    """In words."""
    return f"{result['num_tables']} x {result['num_embeddings']:,} rows"


def batch_of(result: Mapping[str, Any]) -> str:
    """In words."""
    return f"{result['batch_size']:,} x {result['ids_per_bag']}"
