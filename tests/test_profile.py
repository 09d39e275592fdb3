"""The id histogram: counted as Python counts, kept in a file, and asked for shares of rows."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor

import shardemb as se
from shardemb import cli
from shardemb.data import profile_counter
from shardemb.data.click_log_profile import profile_click_log
from shardemb.data.id_hash import hash_ids
from shardemb.data.profile import FeatureProfile
from shardemb.data.profile_file import describe_profile
from shardemb.traffic import traffic_of
from tests.criteo_lines import line

REAL = Path(__file__).parents[2] / "shared/data/criteo-small"


def made_profile(**changed: Any) -> FeatureProfile:
    fields: dict[str, Any] = {
        "num_embeddings": 10,
        "num_samples": 6,
        "num_ids": 12,
        "num_rows_touched": 5,
        "block_rows": 4,
        "block_counts": (4, 0, 1),
        "hot_rows": {9: 4, 1: 3},
        "hottest_percent_share": 0.25,
    }
    return FeatureProfile(**(fields | changed))


def share_by_row(profile: FeatureProfile, rows: Sequence[int]) -> float:
    """The share of some rows, added up row by row as the documentation says."""
    count = 0.0
    for row in rows:
        block = row // profile.block_rows
        first = block * profile.block_rows
        size = min(profile.block_rows, profile.num_embeddings - first)
        count += profile.hot_rows.get(row, 0) + profile.block_counts[block] / size
    return count / profile.num_ids


@pytest.mark.parametrize("seed", range(10))
def test_shares_are_those_of_their_rows(seed: int) -> None:
    draw = random.Random(seed)
    num_rows, block_rows = draw.choice([1, 7, 64, 301]), draw.choice([1, 3, 64, 1000])
    blocks = tuple(draw.choice([0, 1, 9]) for _ in range(-(-num_rows // block_rows)))
    hot = {row: draw.randrange(1, 50) for row in draw.sample(range(num_rows), num_rows // 5)}
    num_ids = sum(blocks) + sum(hot.values()) + (not sum(blocks) and not hot)
    profile = made_profile(
        num_embeddings=num_rows,
        block_rows=block_rows,
        block_counts=(*blocks[:-1], num_ids - sum(blocks[:-1]) - sum(hot.values())),
        hot_rows=hot,
        num_ids=num_ids,
        num_rows_touched=1,
    )
    cuts = sorted(draw.randrange(num_rows + 1) for _ in range(5))
    boundaries = [0, *cuts, num_rows]
    expected = [
        share_by_row(profile, range(first, end)) for first, end in itertools.pairwise(boundaries)
    ]
    shares = profile.shares(boundaries)
    assert shares.tolist() == pytest.approx(expected, abs=1e-12)
    assert shares.sum() == pytest.approx(1)
    for (first, end), share in zip(itertools.pairwise(boundaries), expected, strict=True):
        assert profile.share(first, end - first) == pytest.approx(share, abs=1e-12)
    beyond = profile.shares([0, num_rows, num_rows + 5, 10**9])
    assert beyond.tolist() == pytest.approx([1, 0, 0])


def test_a_profile_without_ids_has_no_shares() -> None:
    profile = made_profile(num_ids=0, num_rows_touched=0, block_counts=(0, 0, 0), hot_rows={})
    assert profile.shares([0, 5, 10]).tolist() == [0, 0]
    assert (profile.ids_per_sample, profile.hottest_row_share) == (0, 0)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"num_embeddings": 0}, "num_embeddings must be at least 1, got 0"),
        ({"block_rows": 0}, "block_rows must be at least 1, got 0"),
        ({"block_rows": 5}, "10 rows in blocks of 5 need 2 block_counts, got 3"),
        ({"block_counts": (5, -1, 1)}, "counts must not be negative, got -1"),
        ({"num_samples": -1}, "counts must not be negative, got -1"),
        ({"hot_rows": {10: 7}}, r"hot row 10 is outside 0\.\.9"),
        ({"num_ids": 11}, "must be what block_counts and hot_rows add up to, 12, got 11"),
        ({"num_rows_touched": 11}, r"num_rows_touched must be in 1\.\.10, .* got 11"),
        ({"num_rows_touched": 0}, r"num_rows_touched must be in 1\.\.10, .* got 0"),
        ({"hottest_percent_share": 1.5}, "must be between 0 and 1, got 1.5"),
        ({"hottest_percent_share": float("nan")}, "must be between 0 and 1, got nan"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(changed: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        made_profile(**changed)


def tables(**rows: int) -> list[se.TableConfig]:
    return [
        se.TableConfig(name=name, num_embeddings=n, embedding_dim=4, feature_names=(name,))
        for name, n in rows.items()
    ]


def check_counts(profile: FeatureProfile, ids: Sequence[int], num_samples: int) -> None:
    """A profile against a plain count of its ids."""
    counts, num_rows = Counter(ids), profile.num_embeddings
    hottest = sorted(counts, key=lambda row: (-counts[row], row))
    assert profile.num_samples == num_samples
    assert profile.num_ids == len(ids)
    assert profile.num_rows_touched == len(counts)
    assert dict(profile.hot_rows) == {row: counts[row] for row in hottest[:100]}
    assert len(profile.block_counts) <= 4096
    others = Counter(row // profile.block_rows for row in ids if row not in profile.hot_rows)
    assert profile.block_counts == tuple(
        others[block] for block in range(len(profile.block_counts))
    )
    percent = hottest[: max(1, -(-num_rows // 100))]
    assert profile.hottest_percent_share == pytest.approx(
        sum(counts[row] for row in percent) / len(ids)
    )
    assert profile.hottest_row_share == counts[hottest[0]] / len(ids)


@pytest.mark.parametrize("buffer", [1, 300, 1 << 20])
def test_batches_are_counted_as_python_counts(buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_counter, "_BUFFER_IDS", buffer)  # how often counts are added up
    draw = np.random.default_rng(buffer)
    of = tables(small=5, large=50_000)
    seen: dict[str, list[int]] = {"small": [], "large": []}
    batches = []
    for _ in range(20):
        bags = {
            table.name: [
                ((draw.zipf(1.3, draw.integers(0, 9)) - 1) % table.num_embeddings).tolist()
                for _ in range(16)
            ]
            for table in of
        }
        for name, lists in bags.items():
            seen[name] += [row for bag in lists for row in bag]
        batches.append(se.keyed_jagged_tensor(bags, of))
    profile = se.profile_batches(iter(batches), of, source="draws")
    assert profile.source == "draws"
    for name, ids in seen.items():
        check_counts(profile.features[name], ids, 320)
        assert profile.features[name].ids_per_sample == len(ids) / 320
    assert profile.features["small"].block_rows == 1
    exact = [seen["small"].count(row) / len(seen["small"]) for row in range(5)]
    assert profile.features["small"].shares(range(6)).tolist() == pytest.approx(exact)


def test_weighted_batches_and_features_of_two_tables_are_counted() -> None:
    shared = [
        se.TableConfig(name=name, num_embeddings=n, embedding_dim=4, feature_names=("x",))
        for name, n in (("one", 7), ("two", 9))
    ]
    batch = se.keyed_jagged_tensor({"x": [[6, 6], []]}, shared, weights={"x": [[1, 2], []]})
    profile = se.profile_batches([batch], shared).features["x"]
    assert (profile.num_embeddings, profile.hot_rows) == (7, {6: 2})


def test_a_feature_of_a_small_and_a_large_table_is_counted_so_that_a_plan_can_use_it() -> None:
    sizes = {"large": 1_000_000, "small": 200}
    shared = [
        se.TableConfig(name=name, num_embeddings=n, embedding_dim=4, feature_names=("x",))
        for name, n in sizes.items()
    ]
    batch = se.keyed_jagged_tensor({"x": [[row] * 2 for row in range(200)]}, shared)
    profile = se.profile_batches([batch], shared)
    assert profile.features["x"].num_embeddings == 200
    plan = se.plan_sharding(
        se.EmbeddingBagCollection(shared),
        se.Env(world_size=2),
        {name: se.layouts.row_wise() for name in sizes},
        workload=se.Workload(batch_size=50, profile=profile),
    )
    # all ids lie in the first half of the large table's rows, and in both halves of the small one's
    assert traffic_of(plan).lookups_TW.tolist() == [[200, 0], [100, 100]]


def test_batches_that_do_not_fit_the_tables_are_refused() -> None:
    batch = KeyedJaggedTensor(keys=["x"], values=torch.tensor([9]), lengths=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="feature 'x', sample 1: id 9 is outside 0"):
        se.profile_batches([batch], tables(x=9))
    with pytest.raises(ValueError, match="feature 'y' of table 'y' is not in the batch"):
        se.profile_batches([batch], tables(x=10, y=10))
    with pytest.raises(ValueError, match="a profile needs at least one sample, got none"):
        se.profile_batches([], tables(x=9))


def a_profile() -> se.DataProfile:
    return se.DataProfile(
        source='lines of "Çay"',
        features={"C1": made_profile(), "C2": made_profile(hottest_percent_share=None)},
    )


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("old")
    se.save_profile(a_profile(), path)
    assert se.load_profile(path) == a_profile()
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]
    with pytest.raises(FileNotFoundError):
        se.load_profile(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (
            '{"format"',
            "",
            "profile .*profile.json cannot be used: .*; make it again with shardemb da",
        ),
        ('"format": 1', '"format": 2', "it is of format 2, and this version reads 1"),
        ('"source"', '"sauce"', "the profile has an unknown key 'sauce'; known are source, feat"),
        ('{"format": 1, ', "{", "it is not a profile"),
        ('"source"', '"features": 1, "source"', "key 'features' is there twice"),
        ('"num_ids": 12', '"num_ids": 13', "features 'C1': num_ids must be what .* 12, got 13"),
        (
            '"num_ids": 12',
            '"num_ids": "12"',
            "features 'C1': num_ids must be a whole number, got \"12\"",
        ),
        (
            '"num_ids": 12',
            '"num_ids": 12.0',
            "features 'C1': num_ids must be a whole number, got 12.0",
        ),
        ('"num_ids"', '"num_idz"', "features 'C1' has an unknown key 'num_idz'; known are num_emb"),
        ('"num_ids": 12, ', "", "features 'C1' lacks the key 'num_ids'"),
        ('"9": 4', '"99": 4', "features 'C1': hot row 99 is outside"),
        ('"9": 4', '"9": 4.5', "features 'C1': hot_rows '9' must be a whole number, got 4.5"),
        ('"9": 4', '"nine": 4', "features 'C1': hot_rows: keys must be whole numbers, got 'nine'"),
        (
            "[4, 0, 1]",
            "[4, 0, true]",
            "features 'C1': block_counts must be a whole number, got true",
        ),
        ("[4, 0, 1]", "5", "features 'C1': block_counts must be a list, got 5"),
        ("0.25", '"a"', "features 'C1': hottest_percent_share must be a number, got \"a\""),
        ("0.25", "NaN", "features 'C1': hottest_percent_share must be from .* got NaN"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, old: str, new: str, text: str) -> None:
    path = tmp_path / "profile.json"
    se.save_profile(a_profile(), path)
    whole = path.read_text()
    assert old in whole
    path.write_text(whole.replace(old, new, 1))
    with pytest.raises(ValueError, match=text):
        se.load_profile(path)
    for length in (0, 30, len(whole) // 2):
        path.write_text(whole[:length])
        with pytest.raises(ValueError, match=r"profile .*profile\.json cannot be used"):
            se.load_profile(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"profile .*profile\.json cannot be used"):
        se.load_profile(path)


def category_rows(text: str, category: int, num_embeddings: int) -> list[int]:
    """The rows of a category, from the text itself."""
    cells = [row.split("\t")[13 + category] for row in text.splitlines()]
    raw = np.array([int(cell, 16) for cell in cells if cell], dtype=np.int64)
    rows: list[int] = hash_ids(raw, num_embeddings).tolist()
    return rows


def test_a_click_log_is_counted_line_by_line(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = [
        line("1", (), [f"{int(draw.paretovariate(0.5)) % 2**32:08x}", "" if at % 3 else "000000ff"])
        for at in range(500)
    ]
    path = tmp_path / "train.txt"
    path.write_bytes(b"".join([*lines[:50], b"spam\n", *lines[50:]]))
    (tmp_path / "valid.txt").write_bytes(lines[0])
    calls: list[tuple[int, int]] = []
    profile = profile_click_log(
        tmp_path, num_embeddings=9000, on_progress=lambda done, total: calls.append((done, total))
    )
    text = b"".join(lines).decode()
    for category in (1, 2):
        rows = category_rows(text, category, 9000)
        check_counts(profile.features[f"C{category}"], rows, 500)
    assert len(category_rows(text, 2, 9000)) == 167
    assert profile.features["C3"].num_ids == 0
    assert list(profile.features) == [f"C{number}" for number in range(1, 27)]
    assert calls == [(501, 501)]
    some = profile_click_log(path, num_embeddings=9000, max_samples=40).features["C1"]
    check_counts(some, category_rows(b"".join(lines[:40]).decode(), 1, 9000), 40)
    with pytest.raises(
        ValueError, match=r"train\.txt:51: 1 field instead of 40; this is malformed"
    ):
        profile_click_log(tmp_path, num_embeddings=9000, max_malformed=0)
    with pytest.raises(ValueError, match="num_embeddings must be at least 1, got 0"):
        profile_click_log(tmp_path, num_embeddings=0)


def test_the_command_prints_a_table_and_writes_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = tmp_path / "log", tmp_path / "profile.json"
    assert cli.main(["data", "generate", str(log), "--rows", "200", "--test-rows", "20"]) == 0
    assert cli.main(["data", "profile", str(log), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"200 lines of train.txt in {log}" in printed
    assert f"written to {out}" in printed
    profile = se.load_profile(out)
    assert describe_profile(profile) in printed
    first = next(row for row in printed.splitlines() if row.startswith("C1 "))
    assert f"{profile.features['C1'].num_rows_touched:,} of 100,000" in first
    assert json.loads(out.read_text())["source"] == profile.source

    assert cli.main(["data", "profile", str(tmp_path / "none")]) == 1
    assert "none' does not exist; give a file or a folder" in capsys.readouterr().err
    assert cli.main(["data", str(log)]) == 2
    assert f"there is no command 'data {log}'; there are generate, profile" in (
        capsys.readouterr().err
    )
    assert cli.main(["data"]) == 2
    assert "profile   Counts which rows a click log" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "profile", str(log), "--rows", "5"])


@pytest.mark.skipif(not REAL.is_dir(), reason="the sample of Criteo's log is not here")
def test_the_real_sample_is_counted_line_by_line() -> None:
    profile = profile_click_log(REAL, num_embeddings=5000)
    text = (REAL / "train.txt").read_text()
    for category in range(1, 27):
        rows = category_rows(text, category, 5000)
        check_counts(profile.features[f"C{category}"], rows, 7200)
    missing = 1 - sum(feature.num_ids for feature in profile.features.values()) / 7200 / 26
    assert 0.1 < missing < 0.15
