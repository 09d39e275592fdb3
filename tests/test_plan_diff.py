"""What differs between two plans, as tables that tell it."""

import re
from dataclasses import replace

import shardemb as se
from shardemb import layouts
from shardemb.layouts import Layout
from shardemb.plans.diff import diff_plans
from shardemb.text import format_bytes
from shardemb.workload import Workload
from tests.plans import ENV, LAYOUTS, every_layout, many_tables, model, table, tables


def rows(text: str) -> list[list[str]]:
    """The first table: table, what, before, after."""
    lines = text.partition("\n\n")[0].splitlines()[1:]
    return [re.split(r" {2,}| ->", line) for line in lines]


def test_equal_plans_have_no_difference() -> None:
    assert diff_plans(every_layout(profile=True), every_layout(profile=True)) == ""


def test_a_layout_that_changes_is_told_with_what_it_costs() -> None:
    where: dict[str, Layout] = LAYOUTS | {
        "user": layouts.table_wise(rank=1),
        "item": layouts.column_wise(ranks=[0, 2]),
    }
    before = every_layout()
    after = se.plan_sharding(model(), ENV, where, workload=before.workload)
    text = diff_plans(before, after)
    assert "user   layout  row_wise ->                   table_wise(rank=1)" in text
    assert "item   layout  column_wise(ranks=(2, 0)) ->  column_wise(ranks=(0, 2))" in text
    assert len(rows(text)) == 2
    old, new = before.bytes_per_rank, after.bytes_per_rank
    assert old != new
    for rank in range(4):
        told = f"{format_bytes(old[rank])} -> {format_bytes(new[rank])}"
        assert re.search(rf"^ *{rank} +{told}", text, re.MULTILINE)
    shares = [max(totals) * 4 / sum(totals) for totals in (old, new)]
    assert f"{shares[0]:.2f} -> {shares[1]:.2f}" in text


def test_tables_that_come_go_and_change_are_told() -> None:
    before = every_layout()
    kept = [t for t in tables(shop={"num_embeddings": 2000}) if t.name != "city"]
    where = {t.name: LAYOUTS[t.name] for t in kept} | {"new": layouts.table_wise(rank=0)}
    after = se.plan_sharding(
        se.EmbeddingBagCollection([*kept, table("new")]), ENV, where, workload=before.workload
    )
    text = diff_plans(before, after)
    assert re.search(r"shop +bytes +125 KiB -> +250 KiB", text)
    assert re.search(r"shop +num_embeddings +1000 -> +2000", text)
    assert re.search(r"city +removed +1,000 x 16, table_wise\(rank=3\), 62.5 KiB ->", text)
    assert re.search(r"new +added +-> +1,000 x 16, table_wise\(rank=0\), 125 KiB", text)
    assert len(rows(text)) == 4


def test_another_order_cluster_or_workload_is_told() -> None:
    before = every_layout(profile=True)
    turned = replace(before, tables=before.tables[::-1])
    assert re.search(
        r"\(tables\) +order +first plan's -> +second plan's", diff_plans(before, turned)
    )
    other = every_layout()
    sized = replace(other, workload=Workload(batch_size=64))
    text = diff_plans(before, sized)
    assert re.search(r"\(workload\) +batch_size +128 -> +64", text)
    assert re.search(r"\(workload\) +ids_per_sample of 'clicked' +2.5 -> +none", text)
    assert re.search(r"\(workload\) +profile +clicks.txt -> +none", text)


def test_other_numbers_of_ranks_are_compared_by_balance_only() -> None:
    text = diff_plans(many_tables(2, num_nodes=1), many_tables(2, num_nodes=2))
    assert re.search(r"\(cluster\) +num_nodes +1 -> +2", text)
    assert re.search(r"t0 +ranks +0-7 -> +0-15", text)
    assert "\nrank " not in text
    assert "balance" in text


def test_of_many_ranks_those_that_change_most_are_shown() -> None:
    plan = many_tables(2, num_nodes=4)
    text = diff_plans(plan, many_tables(3, num_nodes=4))
    assert "and 16 ranks that change less" in text
    assert sum(bool(re.match(r" *\d+ ", line)) for line in text.splitlines()) == 16


def test_reasons_are_told_only_where_nothing_else_differs() -> None:
    before = every_layout()
    first, *others = before.tables
    because = replace(before, tables=(replace(first, chosen_by="planner: 1.00 ms"), *others))
    text = diff_plans(before, because)
    assert re.search(r"user +chosen_by +named -> +planner: 1\.00 ms", text)
    both = replace(because, workload=replace(before.workload, batch_size=64))
    text = diff_plans(before, both)
    assert "batch_size" in text
    assert "chosen_by" not in text


def test_ranks_whose_printed_totals_are_equal_are_not_listed() -> None:
    wide = {"user": {"num_embeddings": 10_000_000}}
    where = LAYOUTS | {"city": layouts.table_wise(rank=3)}
    before = se.plan_sharding(model(**wide), ENV, where)
    other = se.plan_sharding(model(user={"num_embeddings": 10_000_004}), ENV, where)
    assert before.bytes_per_rank[0] != other.bytes_per_rank[0]
    text = diff_plans(before, other)
    assert "num_embeddings" in text
    assert "\nrank " not in text
