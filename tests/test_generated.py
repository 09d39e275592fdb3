"""The generated click log: its bytes, its statistics, and the AUC it promises."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from shardemb.data import generated
from shardemb.data.click_log import find_criteo
from shardemb.data.clicks import CriteoRows
from shardemb.data.criteo import parse_criteo
from shardemb.data.generated import expected_auc, read_generated, write_click_log

Floats = npt.NDArray[np.float64]
FILES = ("train.txt", "test.txt", "generated.json")


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES]


def planted_probabilities(seed: int, num_test: int) -> Floats:
    chunks = generated._PlantedModel(seed).chunks(num_test, part=1)
    return np.concatenate([probabilities_N for _, probabilities_N in chunks])


def auc(labels_N: npt.NDArray[np.float32], scores_N: Floats) -> float:
    """By the definition, for scores that all differ."""
    ranks_N = np.empty(len(scores_N))
    ranks_N[np.argsort(scores_N)] = np.arange(len(scores_N))
    positive = labels_N > 0
    num_positive = positive.sum()
    pairs = num_positive * (len(labels_N) - num_positive)
    return float((ranks_N[positive].sum() - num_positive * (num_positive - 1) / 2) / pairs)


def brute_force_auc(p_N: Floats) -> float:
    right = pairs = 0.0
    for i, p in enumerate(p_N):
        for j, q in enumerate(p_N):
            if i != j:
                right += p * (1 - q) * ((p > q) + 0.5 * (p == q))
                pairs += p * (1 - q)
    return right / pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_click_log(folder, num_train=40_000, num_test=20_000, seed=3)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> CriteoRows:
    return parse_criteo((folder / "train.txt").read_bytes())


def test_expected_auc_equals_the_sum_over_all_pairs() -> None:
    generator = np.random.default_rng(0)
    for p_N in (generator.random(60), np.round(generator.random(80), 1), np.array([0.5, 0.5, 0.2])):
        assert expected_auc(p_N) == pytest.approx(brute_force_auc(p_N), abs=1e-12)
    assert expected_auc(np.array([0.3] * 5)) == pytest.approx(0.5, abs=1e-12)


def test_expected_auc_is_the_mean_over_drawn_labels() -> None:
    generator = np.random.default_rng(1)
    p_N = 1 / (1 + np.exp(1 - 1.5 * generator.standard_normal(3_000)))
    drawn = [auc((generator.random(3_000) < p_N).astype(np.float32), p_N) for _ in range(400)]
    standard_error = np.std(drawn) / np.sqrt(len(drawn))
    assert standard_error < 0.001
    assert abs(np.mean(drawn) - expected_auc(p_N)) < 4 * standard_error


def test_expected_auc_of_rows_that_cannot_differ_is_refused() -> None:
    with pytest.raises(ValueError, match="the AUC of 3 rows is undefined"):
        expected_auc(np.zeros(3))


def test_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_click_log(tmp_path / name, num_train=9_000, num_test=500, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert not set(digests(tmp_path / "a")) & set(digests(tmp_path / "c"))


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    write_click_log(tmp_path / "here", num_train=100, num_test=50)
    script = (
        "import pathlib, sys; from shardemb.data.generated import write_click_log; "
        "write_click_log(pathlib.Path(sys.argv[1]), num_train=100, num_test=50)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "there")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], capture_output=True)
    assert digests(tmp_path / "here") == digests(tmp_path / "there")


def test_longer_log_begins_with_the_shorter(tmp_path: Path) -> None:
    write_click_log(tmp_path / "short", num_train=8_200, num_test=10)
    write_click_log(tmp_path / "long", num_train=20_000, num_test=10)
    short, long = ((tmp_path / name / "train.txt").read_bytes() for name in ("short", "long"))
    assert long.startswith(short)
    assert len(long.splitlines()) == 20_000
    first, second = long.splitlines()[0], long.splitlines()[8192]
    assert first != second


def test_log_is_criteo_s_format(folder: Path, rows: CriteoRows) -> None:
    files = find_criteo(folder)
    assert [file.name for file in files.train + files.held_out] == ["train.txt", "test.txt"]
    assert len(rows.labels_N) == 40_000
    assert rows.malformed == ()
    assert rows.labels_N.mean() == pytest.approx(0.245, abs=0.015)
    assert rows.integer_missing_NI.mean(axis=0) == pytest.approx([0.10] * 13, abs=0.01)
    assert rows.category_missing_NF.mean(axis=0) == pytest.approx([0.03] * 26, abs=0.005)
    assert (rows.integers_NI[:, 1] < 0).any()
    assert (np.delete(rows.integers_NI, 1, axis=1) >= 0).all()
    assert np.expm1(rows.integers_NI[:, 4]).max() > 100_000


def test_ids_are_zipf_and_their_tokens_unlike_in_any_two_fields(rows: CriteoRows) -> None:
    present_NF = ~rows.category_missing_NF
    tokens = [
        np.unique(rows.categories_NF[present_NF[:, f], f], return_counts=True) for f in range(26)
    ]
    num_ids = [len(ids) for ids, _ in tokens]
    assert sum(number <= 100 for number in num_ids) == 8
    assert max(num_ids) > 4_000
    assert len(np.unique(np.concatenate([ids for ids, _ in tokens]))) == sum(num_ids)
    counts = np.sort(tokens[2][1])[::-1]  # exponent 1.14
    assert counts[0] / counts[9] == pytest.approx(10**1.14, rel=0.15)


def test_tokens_of_all_ids_of_a_field_differ() -> None:
    text = generated._tokens(2, 20_000)
    assert text.shape == (20_001, 9)
    assert len(np.unique(text, axis=0)) == 20_001
    assert bytes(text[-1]) == b"\0" * 8 + b"\t"


def test_labels_follow_the_planted_probabilities(folder: Path) -> None:
    labels_N = parse_criteo((folder / "test.txt").read_bytes()).labels_N
    p_N = planted_probabilities(3, 20_000)
    best_auc = read_generated(folder).best_auc
    assert 0.78 <= best_auc <= 0.82
    assert best_auc == round(expected_auc(p_N), 6)
    assert auc(labels_N, p_N) == pytest.approx(best_auc, abs=0.012)
    for low in np.arange(0.1, 0.8, 0.1):
        bucket = (p_N >= low) & (p_N < low + 0.1)
        standard_error = 0.5 / np.sqrt(bucket.sum())
        assert abs(labels_N[bucket].mean() - p_N[bucket].mean()) < 4 * standard_error


def test_equal_cells_have_equal_probabilities() -> None:
    model = generated._PlantedModel(0)
    counts = np.repeat([[3] * 13], 2, axis=0)
    missing = np.zeros((2, 13), dtype=np.bool_)
    ids = np.repeat([[1] * 26], 2, axis=0)
    same = model._logits(counts, missing, ids)
    assert same[0] == same[1]
    ids[1, 16] = 2
    different = model._logits(counts, missing, ids)
    assert different[0] == same[0] != different[1]


def test_some_of_the_signal_is_in_pairs_of_fields() -> None:
    model = generated._PlantedModel(0)
    missing = np.ones((4, 13), dtype=np.bool_)
    counts = np.zeros((4, 13), dtype=np.int64)
    ids = np.repeat([[0] * 26], 4, axis=0)
    ids[[1, 3], 5] = 1
    ids[[2, 3], 16] = 1
    logits = model._logits(counts, missing, ids)
    assert abs(logits[3] - logits[2] - logits[1] + logits[0]) > 1e-4
    ids[[2, 3], 16] = 0
    ids[[2, 3], 0] = 1  # fields 0 and 5 are no pair
    logits = model._logits(counts, missing, ids)
    assert logits[3] - logits[2] - logits[1] + logits[0] == pytest.approx(0, abs=1e-12)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    log = write_click_log(tmp_path, num_train=20, num_test=10, seed=5)
    assert read_generated(tmp_path) == log
    about = json.loads((tmp_path / "generated.json").read_text())
    assert about["num_ids"]["C3"] == 20_000
    assert (about["seed"], about["num_train"], about["num_test"]) == (5, 20, 10)
    with pytest.raises(ValueError, match=r"holds no generated log: generated.json: No such file"):
        read_generated(tmp_path / "absent")


def test_killed_run_leaves_no_log_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(generated, "expected_auc", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_click_log(tmp_path, num_train=20, num_test=10)
    assert not any((tmp_path / name).exists() for name in FILES)
    with pytest.raises(ValueError, match="has neither"):
        find_criteo(tmp_path)
    with monkeypatch.context() as patch:  # killed after the first of the files got its name
        real_replace = os.replace

        def replace_one(source: Path, target: Path) -> None:
            if target.name != "train.txt":
                raise KeyboardInterrupt
            real_replace(source, target)

        patch.setattr(os, "replace", replace_one)
        with pytest.raises(KeyboardInterrupt):
            write_click_log(tmp_path, num_train=20, num_test=10)
    assert not (tmp_path / "generated.json").exists()
    write_click_log(tmp_path, num_train=20, num_test=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_log_that_was_not_generated_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("mine")
    with pytest.raises(
        ValueError,
        match=r"holds train\.txt and no generated\.json, so it is not that of a generated log",
    ):
        write_click_log(tmp_path, num_train=20, num_test=10)
    assert (tmp_path / "train.txt").read_text() == "mine"


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    for wrong in ({"num_train": 0}, {"num_test": 1}, {"seed": -1}, {"seed": 1 << 63}):
        with pytest.raises(ValueError, match="num_train must be at least 1, num_test at least 2"):
            write_click_log(
                tmp_path / "log", **({"num_train": 2, "num_test": 2, "seed": 0} | wrong)
            )
    assert not (tmp_path / "log").exists()
