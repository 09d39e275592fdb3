"""The page of a plan: its bars add up to the plan's numbers, and nothing comes from elsewhere."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import shardemb as se
from shardemb import layouts
from shardemb.placement import ShardingPlan
from shardemb.plans.costs import costs_of
from shardemb.plans.svg_bars import ticks
from tests.plans import every_layout, many_tables, table

SVG = "{http://www.w3.org/2000/svg}"


def charts(page: str) -> list[ElementTree.Element]:
    """The bars of memory, of bytes sent and of lookups, as XML."""
    found = re.findall(r'<svg class="bars".*?</svg>', page, re.DOTALL)
    return [ElementTree.fromstring(text) for text in found]


def height_by_rank(chart: ElementTree.Element, num_ranks: int) -> list[float]:
    """The heights of the rectangles of each rank; they stand on one another without gaps."""
    heights = [0.0] * num_ranks
    floor = [0.0] * num_ranks
    for rect in chart.iter(f"{SVG}rect"):
        rank = int((rect.findtext(f"{SVG}title") or "").split(",")[0].removeprefix("rank "))
        y, height = float(rect.attrib["y"]), float(rect.attrib["height"])
        if floor[rank]:
            assert y + height == pytest.approx(floor[rank], abs=0.03)
        floor[rank] = y
        heights[rank] += height
    return heights


@pytest.mark.parametrize(
    "plan",
    [every_layout(profile=True), many_tables(3, num_nodes=1, ranks_per_node=2)],
    ids=["every layout", "two ranks"],
)
def test_bars_are_as_high_as_the_ranks_are_loaded(plan: ShardingPlan) -> None:
    costs = costs_of(plan)
    found = charts(plan.to_html())
    assert len(found) == 3
    for chart, load_W in zip(found, costs.loads.values(), strict=True):
        heights = np.array(height_by_rank(chart, plan.world_size))
        assert heights.max() > 50
        np.testing.assert_allclose(heights / heights.max(), load_W / load_W.max(), atol=0.002)
        mean = next(line for line in chart.iter(f"{SVG}line") if line.get("class") == "mean")
        top = min(float(rect.attrib["y"]) for rect in chart.iter(f"{SVG}rect"))
        bottom = top + heights.max()
        expected = bottom - heights.max() * load_W.mean() / load_W.max()
        assert float(mean.attrib["y1"]) == pytest.approx(expected, abs=0.3)


def test_every_part_says_whose_it_is() -> None:
    plan = every_layout()
    memory = charts(plan.to_html())[0]
    titles = [title.text or "" for title in memory.iter(f"{SVG}title")]
    assert "rank 3, city: 62.5 KiB of 340 KiB" in titles
    held = {(shard.rank, t.table) for t in plan.tables for shard in t.shards}
    said = {
        (int(match[1]), match[2])
        for match in (re.match(r"rank (\d+), (\w+):", text) for text in titles)
        if match
    }
    assert said == held


def test_a_thousand_ranks_share_few_colours_and_still_add_up() -> None:
    plan = many_tables(100, num_nodes=128)
    page = plan.to_html()
    assert len(page) < 8_000_000
    memory = charts(page)[0]
    assert len(list(memory.iter(f"{SVG}rect"))) == 1024 * 7
    assert "94 other tables" in page
    heights = np.array(height_by_rank(memory, 1024))
    expected = np.array(plan.bytes_per_rank) / max(plan.bytes_per_rank)
    np.testing.assert_allclose(heights / heights.max(), expected, atol=0.002)
    assert page.count("<tr>") == 1 + 3 + 1 + 100 + 1 + 1024


class _Page(HTMLParser):
    """Open elements, the outside addresses, and the text of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [given[name] or "" for name in ("src", "href") if name in given]
        if tag not in {"meta", "rect", "line"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in {"rect", "line"}:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["td"]:
            self.cells.append(data)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    name = '<script src="x.js">"&\'</script>'
    model = se.EmbeddingBagCollection([table(name.replace(".", "_")), table("b")])
    plan = se.plan_sharding(
        model,
        se.Env(world_size=2),
        {t: layouts.row_wise() for t in (name.replace(".", "_"), "b")},
    )
    (tmp_path / "plan.html").write_text("old")
    plan.save_html(tmp_path / "plan.html")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.html"]
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert page == plan.to_html()
    assert "<script" not in page
    assert "<p></p>" not in page
    assert ", sizes of messages: " in page
    parser = _Page()
    parser.feed(page)
    assert parser.open == []
    assert parser.links == []
    assert name.replace(".", "_") in parser.cells
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_the_memory_of_a_rank_is_drawn_where_it_is_near() -> None:
    plan = many_tables(2, num_nodes=1, ranks_per_node=2)
    assert 'class="limit"' not in plan.to_html()
    memory_bytes = round(1.25 * max(plan.bytes_per_rank))
    near = replace(plan, cluster=replace(plan.cluster, memory_bytes=memory_bytes))
    memory = charts(near.to_html())[0]
    (limit,) = [line for line in memory.iter(f"{SVG}line") if line.get("class") == "limit"]
    rects = list(memory.iter(f"{SVG}rect"))
    heights = height_by_rank(memory, 2)
    bottom = max(float(rect.attrib["y"]) + float(rect.attrib["height"]) for rect in rects)
    assert bottom - float(limit.attrib["y1"]) == pytest.approx(1.25 * max(heights), abs=0.1)


def test_ticks_are_round_and_few() -> None:
    giant = (1.24 * 2**30, 1.49 * 2**30, 1.5 * 2**30, 1.99 * 2**30, 2 * 2**30, 5.99 * 2**30)
    for top in (0.5, 1, 1.99, 7, 999, 1025, *giant, 900 * 2**20, 80 * 2**30, 3 * 2**50):
        for is_binary in (False, True):
            found = ticks(top, is_binary=is_binary)
            assert found[0] == 0
            assert 1 <= len(found) <= 6
            assert found[-1] <= top
    assert ticks(1.49 * 2**20, is_binary=True) == [n * 2**18 for n in range(6)]
    assert ticks(1.99 * 2**20, is_binary=True) == [n * 2**19 for n in range(4)]
    assert ticks(80 * 2**30, is_binary=True) == [n * 20 * 2**30 for n in range(5)]
