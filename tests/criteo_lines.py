"""Lines in Criteo's format, written by hand for tests."""

from collections.abc import Sequence

NUM_EMBEDDINGS = [1000] * 26


def line(label: str = "0", integers: Sequence[str] = (), categories: Sequence[str] = ()) -> bytes:
    cells = [label, *integers, *[""] * (13 - len(integers))]
    cells += [*categories, *[""] * (26 - len(categories))]
    return "\t".join(cells).encode() + b"\n"


def numbered(count: int) -> bytes:
    """Lines whose I1 and C1 are their number, from 0."""
    return b"".join(line(str(at % 2), [str(at)], [f"{at:08x}"]) for at in range(count))
