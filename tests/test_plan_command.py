"""`shardemb plan`, `shardemb plan diff` and `shardemb train --plan` as a user types them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardemb import cli
from shardemb.data.generated import write_click_log
from shardemb.data.profile import DataProfile
from shardemb.data.profile_file import save_profile
from shardemb.plans.file import read_plan
from shardemb.traffic import traffic_of
from tests.plans import hot_profile

SMALL = ("--num-embeddings", "2000")


def plan(*arguments: object) -> int:
    return cli.main(["plan", *SMALL, *map(str, arguments)])


def test_a_plan_is_saved_drawn_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "plan.json", tmp_path / "plan.html"
    assert plan("--world-size", 4, "--num-nodes", 2, "--save", file, "--html", page) == 0
    said = capsys.readouterr()
    made = read_plan(file)
    assert said.out == f"{made}\n"
    assert said.err == f"written to {file}\nwritten to {page}\n"
    assert (made.world_size, made.num_nodes, made.workload.batch_size) == (4, 2, 240)
    assert page.read_text() == made.to_html()
    assert plan("--world-size", 4, "--num-nodes", 2, "--plan", file, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(made.to_json())
    assert plan("--world-size", 8, "--plan", file) == 1
    assert "it is for 4 ranks on 2 nodes, this run has 8 ranks on 1 node" in capsys.readouterr().err


def test_the_batch_is_that_of_all_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert plan("--world-size", 4, "--batch-size", 4096, "--save", file) == 0
    assert read_plan(file).workload.batch_size == 1024
    assert plan("--world-size", 7, "--save", file) == 0
    assert read_plan(file).workload.batch_size == 138  # the first after 960 that divides by 7
    capsys.readouterr()
    assert plan("--world-size", 3, "--batch-size", 100) == 1
    assert "a batch of 100 samples does not divide by 3 ranks" in capsys.readouterr().err


def test_a_cluster_by_name_is_planned_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert plan("--cluster", "h100", "--num-nodes", 4, "--save", file) == 0
    made = read_plan(file)
    assert (made.cluster.name, made.world_size, made.num_nodes) == ("h100", 32, 4)
    assert made.cluster.memory_bytes == 80 * 10**9
    assert "plan for 32 ranks on 4 nodes of 'h100' (cuda" in capsys.readouterr().out
    assert plan("--cluster", "h100", "--world-size", 4, "--num-nodes", 2, "--save", file) == 0
    assert read_plan(file).cluster.ranks_per_node == 2
    capsys.readouterr()
    assert plan("--cluster", "h1000") == 1
    assert "there is no preset 'h1000'; there are h100, h200, b200" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        plan("--cluster", "h100", "--probe")
    assert "argument --probe: not allowed with argument --cluster" in capsys.readouterr().err


def test_a_profile_tells_the_skew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, file = tmp_path / "profile.json", tmp_path / "plan.json"
    feature = hot_profile(2000)
    save_profile(DataProfile(source="clicks.txt", features={"C3": feature}), profile)
    assert plan("--profile", profile, "--save", file) == 0
    text = capsys.readouterr().out
    assert "ids as in clicks.txt" in text
    assert text.splitlines()[-1].split() == ["C3", "row_wise", "28,800", "0", "19,200", "1.50"]
    made = read_plan(file)
    lookups_W = traffic_of(made).lookups_TW[2]
    assert lookups_W.tolist() == [960 * 40 * 0.75, 960 * 40 * 0.25]
    assert made.workload.ids_of("C3") == feature.ids_per_sample
    profile.write_text("{")
    assert plan("--profile", profile) == 1
    assert "make it again with shardemb data profile" in capsys.readouterr().err


def test_help_names_the_options_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--help"])
    text = capsys.readouterr().out
    for option in ("--cluster NAME", "--probe", "--profile FILE", "--save FILE", "--html FILE"):
        assert option in text
    assert "shardemb plan diff BEFORE AFTER" in text
    assert "--embedding-dim" in text


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardemb.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_diff_exits_with_0_1_or_2(tmp_path: Path) -> None:
    one, two, bad = (tmp_path / f"{name}.json" for name in ("one", "two", "bad"))
    assert plan("--save", one) == 0
    assert plan("--save", two, "--row-wise", "C1") == 0
    bad.write_text("{")
    equal = shell("plan", "diff", one, one)
    assert (equal.returncode, equal.stdout, equal.stderr) == (0, "", "")
    differ = shell("plan", "diff", one, two)
    assert differ.returncode == 1
    assert re.search(
        r"^C1 +layout +table_wise\(rank=\d\) -> +row_wise$", differ.stdout, re.MULTILINE
    )
    assert re.search(
        r"^C3 +layout +row_wise -> +table_wise\(rank=\d\)$", differ.stdout, re.MULTILINE
    )
    damaged = shell("plan", "diff", one, bad)
    assert damaged.returncode == 2
    assert damaged.stderr.startswith(f"error: {bad} is not a plan, or is damaged: Expecting")
    assert cli.main(["plan", "diff", str(one), str(tmp_path / "none.json")]) == 2
    bad.write_text("[" * 200_000)
    assert cli.main(["plan", "diff", str(one), str(bad)]) == 2
    bad.write_text(one.read_text().replace("1000", "Infinity").replace("2000", "1e999"))
    assert cli.main(["plan", "diff", str(one), str(bad)]) == 2
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", "diff", str(one)])


@pytest.mark.distributed
def test_training_goes_by_a_plan_file_and_on_with_other_ranks(tmp_path: Path) -> None:
    write_click_log(tmp_path / "log", num_train=400, num_test=40)
    common = ("train", *SMALL, "--batch-size", 16, "--data", tmp_path / "log", "--log-every", 1)
    file = tmp_path / "plan.json"
    layouts = ("--row-wise", "C1", "C2")
    assert plan("--world-size", 1, *layouts, "--save", file) == 0
    by_plan = shell(*common, "--out", tmp_path / "a", "--steps", 4, "--plan", file)
    assert by_plan.returncode == 0, by_plan.stderr
    assert (tmp_path / "a/plan.json").read_bytes() == file.read_bytes()
    told = [table.table for table in read_plan(file).tables if table.layout == "row_wise"]
    assert told == ["C1", "C2"]
    assert f'plan = "{file}"' in (tmp_path / "a/config.toml").read_text()
    again = shell("train", "--out", tmp_path / "a", "--resume", "--steps", 6)
    assert again.returncode == 0, again.stderr
    assert read_plan(tmp_path / "a/plan.json") == read_plan(file)

    other = tmp_path / "other.json"
    assert plan("--world-size", 2, *layouts, "--save", other) == 0
    refused = shell(*common, "--out", tmp_path / "b", "--plan", other)
    assert refused.returncode == 1
    assert "error: the plan in" in refused.stderr
    assert "it is for 2 ranks on 1 node, this run has 1 rank on 1 node" in refused.stderr
    assert not (tmp_path / "b").exists()
    gone = shell("train", *SMALL, "--out", tmp_path / "b", "--plan", tmp_path / "gone.json")
    assert gone.returncode == 1
    assert "gone.json" in gone.stderr
    assert "generating" not in gone.stdout
    assert not (tmp_path / "b").exists()
    grown = shell("train", "--out", tmp_path / "a", "--resume", "--steps", 8, "--plan", other)
    assert grown.returncode == 0, grown.stderr
    assert f"{other} is a plan for 2 ranks on 1 node, and the run goes on with 1" in grown.stdout
    assert [t.layout for t in read_plan(tmp_path / "a/plan.json").tables][2] == "row_wise"
