"""`print(plan)`: what it says is what the plan holds."""

import re
from dataclasses import replace

import numpy as np
import pytest

import shardemb as se
from shardemb import layouts
from shardemb.plans.costs import costs_of
from shardemb.text import format_bytes
from shardemb.traffic import traffic_of
from tests.plans import ENV, LAYOUTS, every_layout, many_tables, table


def cells(text: str, first: str) -> dict[str, str]:
    """The line that begins with a word, by the header above it; columns are two spaces apart."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:1] == [first])
    header = next(
        line for line in reversed(lines[:at]) if re.match(r" *(table|rank|bal|split)", line)
    )
    names = re.split(r" {2,}", header.strip())
    return dict(zip(names, re.split(r" {2,}", lines[at].strip()), strict=True))


def test_each_table_is_a_line_with_what_it_costs() -> None:
    plan = every_layout()
    text, traffic = str(plan), traffic_of(plan)
    for number, placed in enumerate(plan.tables):
        line = cells(text, placed.table)
        assert line["rows x dim"] == f"{placed.num_embeddings:,} x {placed.embedding_dim}"
        assert line["layout"] == LAYOUTS[placed.table].torchrec_name
        assert line["weights"] == format_bytes(sum(s.weight_bytes for s in placed.shards))
        assert line["optimizer"] == format_bytes(sum(s.optimizer_bytes for s in placed.shards))
        assert line["activations"] == format_bytes(traffic.activation_bytes_TW[number].sum())
        assert line["sent"] == format_bytes(traffic.sent_bytes_TW[number].sum())
        assert (line["dtype"], line["trained by"]) == (placed.dtype, placed.optimizer)
        assert line["chosen by"] == "named"
    assert cells(text, "user")["ranks"] == "0-3"
    assert cells(text, "item")["ranks"] == "0,2"
    assert cells(text, "shop")["ranks"] == "2-3"


def test_each_rank_is_a_line_and_the_most_loaded_are_named() -> None:
    plan = every_layout()
    text, traffic = str(plan), traffic_of(plan)
    lookups_W = traffic.lookups_TW.sum(0)
    for rank in range(4):
        line = cells(text, str(rank))
        assert line["memory"] == format_bytes(plan.bytes_per_rank[rank])
        assert line["sent"] == format_bytes(traffic.sent_bytes_W[rank])
        assert line["lookups"] == f"{lookups_W[rank]:,.0f}"
    for name, load_W in (
        ("memory", np.array(plan.bytes_per_rank)),
        ("sent", traffic.sent_bytes_W),
        ("lookups", lookups_W),
    ):
        line = cells(text, name)
        assert line["on rank"] == str(load_W.argmax())
        assert line["most / mean"] == f"{load_W.max() / load_W.mean():.2f}"
        assert float(line["most / mean"]) > 1


def test_what_all_tables_share_is_said_once() -> None:
    model = se.EmbeddingBagCollection([table("a"), table("b")])
    plan = se.plan_sharding(model, ENV, {"a": layouts.row_wise(), "b": layouts.row_wise()})
    text = str(plan)
    assert "plan for 4 ranks on 2 nodes of 'a run elsewhere' (cpu, 128 GiB a rank)" in text
    assert "512 samples a rank and step, 1 id a sample of each feature\n" in text
    assert "; memory is weights and optimizer state; activations, sent and" in text
    assert "planner: " not in text
    assert "1 id a sample" not in str(every_layout())
    assert "2 tables, float32, optimizer Adagrad;" in text
    assert not {"dtype", "trained by"} & set(cells(text, "a"))


def test_a_profile_shows_how_hot_the_hottest_shard_is() -> None:
    text = str(every_layout(profile=True))
    assert "ids as in clicks.txt" in text
    line = cells(text.partition("split by rows")[1] + text.partition("split by rows")[2], "user")
    first = 0.5 + 0.5 * 251 / 1003  # row 7 and its neighbours: the first of four shards
    assert line["hottest / mean"] == f"{first * 4:.2f}"
    assert line["on rank"] == "0"
    assert line["hottest shard"] == f"{first * 128 * 4 * 1003 * 2 / 100:,.0f}"
    assert "\nshop" not in text.partition("split by rows")[2]  # it is not in the profile
    assert "split by rows" not in str(every_layout())


def test_a_shard_that_nobody_asks_counts_as_cold() -> None:
    plan = every_layout(profile=True)
    profile = plan.workload.profile
    assert profile is not None
    hot = replace(profile.features["user_id"], num_ids=1003, block_counts=(0,))
    skewed = replace(profile, features={"user_id": hot})
    text = str(replace(plan, workload=replace(plan.workload, profile=skewed)))
    assert "4.00" in text.partition("split by rows")[2]


def test_of_a_thousand_tables_the_largest_are_shown_and_the_rest_summed_up() -> None:
    plan = many_tables(1000, num_nodes=128)
    text, costs = str(plan), costs_of(plan)
    shown = re.findall(r"^t\d+", text, re.MULTILINE)
    assert shown == [f"t{number}" for number in range(999, 959, -1)]
    rest = format_bytes(costs.weight_bytes_TW[:960].sum())
    assert f"and 960 smaller tables: weights {rest}, optimizer" in text
    assert "to_json() has them all" in text
    assert "1,024 ranks on 128 nodes" in text
    assert "... 1,016 ranks in between" in text
    assert len(text.splitlines()) < 70


def test_of_many_ranks_the_most_and_the_least_loaded_are_shown() -> None:
    model = se.EmbeddingBagCollection(
        [table(f"t{rank}", num_embeddings=1000 + rank) for rank in range(20)]
    )
    where = {f"t{rank}": layouts.table_wise(rank=rank) for rank in range(20)}
    text = str(se.plan_sharding(model, se.Env(world_size=20), where))
    ranks = [int(rank) for rank in re.findall(r"^ *(\d+)  ", text, re.MULTILINE)]
    assert ranks == [19, 18, 17, 16, 3, 2, 1, 0]


@pytest.mark.parametrize("world_size", [1, 16])
def test_few_ranks_are_all_shown(world_size: int) -> None:
    model = se.EmbeddingBagCollection([table("a")])
    where = {"a": layouts.row_wise()}
    text = str(se.plan_sharding(model, se.Env(world_size=world_size), where))
    ranks = [int(rank) for rank in re.findall(r"^ *(\d+)  ", text, re.MULTILINE)]
    assert ranks == list(range(world_size))


def test_the_planner_s_reasons_are_explained_under_the_tables() -> None:
    model = se.EmbeddingBagCollection([table("a"), table("b")])
    plan = se.plan_sharding(model, ENV)
    lines = str(plan).splitlines()
    assert plan.tables[0].chosen_by.startswith("planner: ")
    (at,) = [i for i, line in enumerate(lines) if line.startswith("planner: estimated ms of a st")]
    assert lines[at - 1].startswith("b ")
    assert lines[at + 1] == ""
    assert max(map(len, lines)) <= 150
    assert "planner: estimated ms of a step" in plan.to_html()
