"""A plan as a page for the browser: what each rank bears, stacked by table. Needs no network."""

# T tables, P parts of a bar, W ranks

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import numpy as np

from shardemb.placement import ShardingPlan
from shardemb.plans.cells import (
    Cells,
    balance_cells,
    rank_cells,
    say_load,
    skew_cells,
    table_cells,
)
from shardemb.plans.costs import Floats, PlanCosts, costs_of, imbalance
from shardemb.plans.svg_bars import Bars, axis_svg, bars_svg, chart_width
from shardemb.plans.text import describe_plan, explain_choices, memory_warning
from shardemb.text import format_bytes

_COLOURS = (
    *("#3b82c4", "#e0892b", "#3fa66b", "#cb5250", "#8d70c6", "#b0803f"),
    *("#d06fa8", "#7b9a2e", "#2fa3ad", "#bfa31c", "#6270d4"),
)
_OTHERS, _OTHERS_TOO = "#85878d", "#96989e"
_FEW_COLOURS, _MANY_RANKS = 6, 128
_NARROWEST_CHART = 380
_MOST_PARTS = 5_000
"""Of a chart; beyond that the tables that share a colour are one part of a bar."""
_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #62666d; --page: #ffffff;
  --line: #dcdfe4; --limit: #c02626; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e7ea; --soft: #a2a7b0; --page: #17181b;
  --line: #3a3d43; --limit: #ff7b72; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 24px auto; padding: 0 24px; max-width: 1280px; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 28px 0 2px; }
p { margin: 2px 0 8px; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 14px 0 0; padding: 0;
  list-style: none; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 6px;
  border-radius: 2px; }
.plot { display: flex; } .plot svg { display: block; flex: none; } .scroll { overflow-x: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .grid, svg .node { stroke: var(--line); stroke-width: 1; } svg text.node { stroke: none; }
svg .mean { stroke: var(--text); stroke-width: 1.2; stroke-dasharray: 5 4; }
.charts { display: flex; flex-wrap: wrap; column-gap: 40px; }
.charts section { max-width: 100%; }
svg .limit { stroke: var(--limit); stroke-width: 1.5; }
rect:hover { opacity: .72; }
.cells { overflow: auto; max-height: 640px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 6px 0 0; }
th, td { padding: 3px 14px 3px 0; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--page); font-weight: 600; }
.right { text-align: right; } summary { cursor: pointer; margin: 28px 0 2px; font-weight: 600;
  font-size: 16px; }
"""


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """Which tables share a colour: the number of each table's group, names and colours."""

    of_T: list[int]
    names: list[str]
    colours: list[str]


def plan_to_html(plan: ShardingPlan) -> str:
    """A plan as a page, as `ShardingPlan.to_html` says.

    Args:
        plan: The plan.

    Returns:
        An HTML document: memory, bytes sent and lookups of each rank as bars that are stacked by
        table, then the tables of the plan. The tables that weigh most have colours of their own,
        the others share one.

    Raises:
        ValueError: The workload's profile has ids that a table does not have.
    """
    costs = costs_of(plan)
    groups = _groups(plan, costs)
    title, *more = describe_plan(plan).splitlines()
    body = [
        f"<h1>Sharding {escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in (*more, memory_warning(plan, costs)) if line),
        _legend(groups),
        '<div class="charts">',
        *_charts(plan, costs, groups),
        "</div>",
        "<h2>Balance</h2>",
        _table(balance_cells(costs)),
        *_skews(plan, costs),
        "<h2>Tables</h2>",
        _table(table_cells(plan, costs, range(len(plan.tables))), groups.of_T),
        *(f"<p>{escape(line)}</p>" for line in [explain_choices(plan)] if line),
        "<details><summary>Ranks</summary>",
        _table(rank_cells(costs, range(plan.world_size))),
        "</details>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Sharding {escape(title)}</title>\n<style>{_STYLE}{_colour_rules(groups)}</style>\n"
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _groups(plan: ShardingPlan, costs: PlanCosts) -> _Groups:
    """A group for each of the tables that weigh most in any chart, and one for the others."""
    weight_T, traffic = np.zeros(len(plan.tables)), costs.traffic
    for amount_TW in (costs.memory_TW, traffic.sent_bytes_TW, traffic.lookups_TW):
        share_T = amount_TW.sum(1) / max(1.0, float(amount_TW.sum()))
        weight_T = np.maximum(weight_T, share_T)
    most = len(_COLOURS) if plan.world_size <= _MANY_RANKS else _FEW_COLOURS
    own = sorted(np.argsort(-weight_T, kind="stable")[:most].tolist())
    group_of = {number: group for group, number in enumerate(own)}
    names, colours = [plan.tables[number].table for number in own], [*_COLOURS[: len(own)]]
    num_others = len(plan.tables) - len(own)
    if num_others:
        names.append(f"{num_others:,} other table{'s' * (num_others > 1)}")
        colours.append(_OTHERS)
    of_T = [group_of.get(number, len(own)) for number in range(len(plan.tables))]
    return _Groups(of_T=of_T, names=names, colours=colours)


def _colour_rules(groups: _Groups) -> str:
    """A rule for each group; parts that have no colour of their own take turns with two greys."""
    rules = [
        f".g{group} {{ fill: {colour}; background: {colour}; }}"
        for group, colour in enumerate([*groups.colours, _OTHERS])
    ]
    if groups.colours[-1:] == [_OTHERS]:
        last = len(groups.colours) - 1
        rules.append(f"rect.g{last}:nth-of-type(even) {{ fill: {_OTHERS_TOO}; }}")
    return "\n".join([*rules, ""])


def _legend(groups: _Groups) -> str:
    entries = [
        f'<li><span class="swatch g{group}"></span>{escape(name)}</li>'
        for group, name in enumerate(groups.names)
    ]
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _charts(plan: ShardingPlan, costs: PlanCosts, groups: _Groups) -> list[str]:
    traffic = costs.traffic
    memory = format_bytes(plan.cluster.memory_bytes)
    charts = (
        ("memory", f"weights and optimizer state, of {memory} a rank", costs.memory_TW, None),
        (
            "sent",
            "bytes that leave a rank in a step",
            traffic.sent_bytes_TW,
            traffic.shared_bytes_W,
        ),
        ("lookups", "rows that are looked up on a rank in a step", traffic.lookups_TW, None),
    )
    tables = [table.table for table in plan.tables]
    return [
        _chart(
            f"{name.capitalize()}: {what}",
            Bars(
                **_parts(amount_TW, rest_W, tables, groups),
                ranks_per_node=plan.cluster.ranks_per_node,
                say=partial(say_load, name),
                is_binary=name != "lookups",
                limit=plan.cluster.memory_bytes if name == "memory" else None,
            ),
        )
        for name, what, amount_TW, rest_W in charts
    ]


def _parts(
    amount_TW: Floats, rest_W: Floats | None, tables: list[str], groups: _Groups
) -> dict[str, Any]:
    """The parts of bars: one for each table, or for each group, and one for what is of no table."""
    if np.count_nonzero(amount_TW) <= _MOST_PARTS:
        order = sorted(range(len(tables)), key=groups.of_T.__getitem__)
        amounts_PW = amount_TW[order]
        names, colours = [tables[i] for i in order], [groups.of_T[i] for i in order]
    else:
        amounts_PW = np.zeros((len(groups.names), amount_TW.shape[1]))
        np.add.at(amounts_PW, groups.of_T, amount_TW)
        names, colours = groups.names, list(range(len(groups.names)))
    if rest_W is not None:
        amounts_PW = np.vstack([amounts_PW, rest_W])
        names, colours = [*names, "sizes of messages"], [*colours, len(groups.names)]
    return {"amounts_PW": amounts_PW, "names": names, "colours": colours}


def _chart(title: str, bars: Bars) -> str:
    totals_W = bars.totals_W
    busiest = int(totals_W.argmax())
    width = max(_NARROWEST_CHART, chart_width(bars))
    near = "; the line above is the memory of a rank" if bars.limit_is_near else ""
    return (
        f'<section style="width:{width:g}px"><h2>'
        f"{escape(title)}</h2>\n"
        f"<p>most on rank {busiest}: {bars.say(float(totals_W[busiest]))}, "
        f"{imbalance(totals_W):.2f} times the mean (dashed), "
        f"{bars.say(float(totals_W.mean()))}{near}</p>\n"
        f'<div class="plot">{axis_svg(bars)}<div class="scroll" tabindex="0">'
        f"{bars_svg(bars, title)}</div></div></section>"
    )


def _skews(plan: ShardingPlan, costs: PlanCosts) -> list[str]:
    cells = skew_cells(plan, costs)
    return ["<h2>Tables that are split by rows</h2>", _table(cells)] if cells.rows else []


def _table(cells: Cells, groups: Sequence[int] = ()) -> str:
    """Cells as HTML; with groups, the colour of each row's group stands before its name."""
    right = [' class="right"' if i in cells.right else "" for i in range(len(cells.header))]
    head = "".join(
        f"<th{side}>{escape(name)}</th>" for side, name in zip(right, cells.header, strict=True)
    )
    lines = []
    for number, row in enumerate(cells.rows):
        swatch = f'<span class="swatch g{groups[number]}"></span>' if groups else ""
        inside = [f"<td{side}>{escape(cell)}" for side, cell in zip(right, row, strict=True)]
        inside[0] = f"<td{right[0]}>{swatch}{escape(row[0])}"
        lines.append("<tr>" + "</td>".join(inside) + "</td></tr>")
    body = "\n".join(lines)
    return (
        f'<div class="cells"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
