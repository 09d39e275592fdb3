"""A chart of stacked bars, one for each rank, as SVG. Knows ranks and amounts, not plans."""

# P parts that a bar is stacked of, W ranks

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_HEIGHT, _ABOVE, _BELOW = 200.0, 12, 40
_AXIS_WIDTH = 84
_LABEL_WIDTH = 34
_PITCHES = ((16, 46.0), (64, 15.0), (256, 8.0))
_NARROWEST = 4.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Bars:
    """What a chart shows.

    Attributes:
        amounts_PW: Amount of each part on each rank, float64 [P, W].
        names: Of what the bars are stacked, from the bottom.
        colours: For each part the number of its colour; the page has a rule `.g0` for colour 0.
        ranks_per_node: Ranks that stand together.
        say: An amount in words.
        is_binary: Whether the steps of the axis are powers of 1024 and not of 1000.
        limit: The most that a rank can bear, if there is such; drawn where it is near.
    """

    amounts_PW: Floats
    names: Sequence[str]
    colours: Sequence[int]
    ranks_per_node: int
    say: Callable[[float], str]
    is_binary: bool
    limit: float | None = None

    @property
    def totals_W(self) -> Floats:  # noqa: N802 - its shape
        """The amount on each rank, float64 [W]."""
        totals_W: Floats = self.amounts_PW.sum(0)
        return totals_W

    @property
    def limit_is_near(self) -> bool:
        """Whether a rank has more than half of the limit."""
        return self.limit is not None and self.limit < 2 * float(self.totals_W.max())

    @property
    def top(self) -> float:
        """The amount at the top of the chart."""
        limit = self.limit if self.limit is not None and self.limit_is_near else 0.0
        return 1.05 * max(limit, float(self.totals_W.max())) or 1.0

    @property
    def pitch(self) -> float:
        """Pixels from one bar to the next."""
        num_ranks = self.amounts_PW.shape[1]
        return next((pitch for most, pitch in _PITCHES if num_ranks <= most), _NARROWEST)


def chart_width(bars: Bars) -> float:
    """Pixels of the axis and all bars."""
    return float(_AXIS_WIDTH + bars.amounts_PW.shape[1] * bars.pitch + 8)


def axis_svg(bars: Bars) -> str:
    """The axis of the amounts, which stays when the bars are scrolled.

    Args:
        bars: What the chart shows.

    Returns:
        An SVG element.
    """
    labels = [
        f'<text x="{_AXIS_WIDTH - 8}" y="{_y(amount, bars) + 4:.2f}" text-anchor="end">'
        f"{escape(bars.say(amount))}</text>"
        for amount in ticks(bars.top, is_binary=bars.is_binary)
    ]
    return _svg("axis", _AXIS_WIDTH, labels)


def bars_svg(bars: Bars, label: str) -> str:
    """The bars, each part with what it is as a hover title.

    Args:
        bars: What the chart shows.
        label: What it is called where it is read aloud.

    Returns:
        An SVG element.
    """
    num_ranks = bars.amounts_PW.shape[1]
    width = chart_width(bars) - _AXIS_WIDTH
    parts = [
        f'<line class="grid" x1="0" x2="{width:g}" y1="{_y(amount, bars):.2f}" '
        f'y2="{_y(amount, bars):.2f}"/>'
        for amount in ticks(bars.top, is_binary=bars.is_binary)
    ]
    for rank in range(num_ranks):
        parts += _bar(bars, rank)
    parts.append(_level("mean", float(bars.totals_W.mean()), width, bars, "mean of the ranks"))
    if bars.limit is not None and bars.limit_is_near:
        parts.append(_level("limit", bars.limit, width, bars, "memory of a rank"))
    return _svg("bars", width, [*parts, *_rank_labels(bars), *_node_labels(bars)], label)


def ticks(top: float, *, is_binary: bool) -> list[float]:
    """Round amounts from 0 up to a top, at most six.

    Args:
        top: The largest amount.
        is_binary: Whether a step is 1, 2 or 5 times 1, 10 or 100 times a power of 1024, as bytes
            are read, or of 1000. Below twice such a power it is a quarter or a half of it.

    Returns:
        The amounts.

    Example:
        >>> ticks(3500, is_binary=False)
        [0, 1000, 2000, 3000]
    """
    base = 1024 if is_binary else 1000
    unit = base ** max(0, math.floor(math.log(top, base)))
    steps = [first * ten * unit for ten in (1, 10, 100, 1000) for first in (1, 2, 5)]
    step = next(step for step in steps if top / step < 6)
    if top / unit < 2:
        step = unit / (4 if top / unit < 1.5 else 2) if unit > 1 else 1
    return [count * step for count in range(math.floor(top / step) + 1)]


def _y(amount: float, bars: Bars) -> float:
    return _ABOVE + _HEIGHT * (1 - amount / bars.top)


def _bar(bars: Bars, rank: int) -> list[str]:
    """A rectangle for each part that the rank has something of."""
    x, width = 4 + (rank + 0.1) * bars.pitch, 0.8 * bars.pitch
    total = bars.say(float(bars.totals_W[rank]))
    below = 0.0
    parts = []
    for part, amount in enumerate(bars.amounts_PW[:, rank].tolist()):
        if amount <= 0:
            continue
        below += amount
        said = f"rank {rank}, {bars.names[part]}: {bars.say(amount)} of {total}"
        parts.append(
            f'<rect class="g{bars.colours[part]}" x="{x:.6g}" y="{_y(below, bars):.2f}" '
            f'width="{width:.3g}" height="{_HEIGHT * amount / bars.top:.2f}">'
            f"<title>{escape(said)}</title></rect>"
        )
    return parts


def _level(kind: str, amount: float, width: float, bars: Bars, name: str) -> str:
    y = _y(amount, bars)
    return (
        f'<line class="{kind}" x1="0" x2="{width:g}" y1="{y:.2f}" y2="{y:.2f}">'
        f"<title>{name}: {escape(bars.say(amount))}</title></line>"
    )


def _rank_labels(bars: Bars) -> list[str]:
    num_ranks = bars.amounts_PW.shape[1]
    every = 1
    while every * bars.pitch < _LABEL_WIDTH:
        every *= 2
    return [
        f'<text x="{4 + (rank + 0.5) * bars.pitch:.5g}" y="{_ABOVE + _HEIGHT + 15:g}" '
        f'text-anchor="middle">{rank}</text>'
        for rank in range(0, num_ranks, every)
    ]


def _node_labels(bars: Bars) -> list[str]:
    """Lines between nodes, and their numbers where there is room."""
    num_ranks = bars.amounts_PW.shape[1]
    width = bars.ranks_per_node * bars.pitch
    if num_ranks == bars.ranks_per_node:
        return []
    bottom = _ABOVE + _HEIGHT
    parts = []
    for node in range(num_ranks // bars.ranks_per_node):
        x = 4 + node * width
        if node:
            parts.append(
                f'<line class="node" x1="{x:.5g}" x2="{x:.5g}" y1="{_ABOVE}" y2="{bottom + 34:g}"/>'
            )
        every = math.ceil(60 / width)
        if node % every == 0:
            parts.append(
                f'<text class="node" x="{x + 4:.5g}" y="{bottom + 32:g}">node {node}</text>'
            )
    return parts


def _svg(kind: str, width: float, parts: Sequence[str], label: str = "") -> str:
    height = _ABOVE + _HEIGHT + _BELOW
    spoken = f' role="img" aria-label="{escape(label)}"' if label else ' aria-hidden="true"'
    inside = "\n".join(parts)
    return (
        f'<svg class="{kind}" xmlns="http://www.w3.org/2000/svg" width="{width:g}" '
        f'height="{height:g}" viewBox="0 0 {width:g} {height:g}"{spoken}>\n{inside}\n</svg>'
    )
