"""Criteo's format, its ids and its batches, on hand-written rows."""

import math

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from shardemb.data.clicks import (
    CATEGORY_NAMES,
    INTEGER_NAMES,
    ClickBatch,
    click_batch,
    hash_categories,
)
from shardemb.data.criteo import parse_criteo
from tests.criteo_lines import NUM_EMBEDDINGS, line, numbered


def test_names_of_the_columns() -> None:
    assert INTEGER_NAMES[0] == "I1"
    assert INTEGER_NAMES[-1] == "I13"
    assert (len(INTEGER_NAMES), len(CATEGORY_NAMES)) == (13, 26)
    assert CATEGORY_NAMES[-1] == "C26"


def test_cells_are_parsed() -> None:
    text = line("1", ["7", "-3", "", "0", "999999999999999999"], ["68fd1e64", "", "FFffFFff"])
    rows = parse_criteo(text + line("0"))
    assert rows.malformed == ()
    assert rows.valid_N.tolist() == [True, True]
    assert rows.labels_N.tolist() == [1.0, 0.0]
    expected = [math.log(8), -math.log(4), 0, 0, math.log(10**18)] + [0] * 8
    np.testing.assert_allclose(rows.integers_NI[0], expected, rtol=1e-6)
    assert rows.integer_missing_NI[0].tolist() == [False, False, True, False, False] + [True] * 8
    assert rows.categories_NF[0, :3].tolist() == [0x68FD1E64, 0, 0xFFFFFFFF]
    assert rows.category_missing_NF[0].tolist() == [False, True, False] + [True] * 23
    assert rows.integer_missing_NI[1].all()
    assert rows.category_missing_NF[1].all()
    assert [rows.integers_NI.dtype, rows.categories_NF.dtype] == [np.float32, np.uint32]


def test_windows_line_ends_and_a_last_line_without_newline_are_accepted() -> None:
    plain = line("1", ["5"], ["0000000a"] * 26) + line("0", ["6"])
    windows = parse_criteo(plain.replace(b"\n", b"\r\n"))
    cut = parse_criteo(plain[:-1])
    for rows in (windows, cut):
        assert rows.malformed == ()
        np.testing.assert_array_equal(rows.categories_NF, parse_criteo(plain).categories_NF)
        np.testing.assert_array_equal(rows.integers_NI, parse_criteo(plain).integers_NI)


def test_nothing_is_parsed_of_no_lines() -> None:
    rows = parse_criteo(b"")
    assert rows.integers_NI.shape == (0, 13)
    assert rows.malformed == ()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"\n", "1 field instead of 40"),
        (b"\r\n", "1 field instead of 40"),
        (b"0\t1\t2\n", "3 fields instead of 40"),
        (line()[2:], "39 fields instead of 40"),
        (line()[:-1] + b"\t\n", "41 fields instead of 40"),
        (line("x"), "label 'x' is not 0 or 1"),
        (line("2"), "label '2' is not 0 or 1"),
        (line("10"), "label '10' is not 0 or 1"),
        (line(""), "label '' is not 0 or 1"),
        (line("1", ["", "", "1.5"]), "integer 3 is '1.5'"),
        (line("1", ["-"]), "integer 1 is '-'"),
        (line("1", ["+1"]), "integer 1 is '+1'"),
        (line("1", ["--1"]), "integer 1 is '--1'"),
        (line("1", [" 1"]), "integer 1 is ' 1'"),
        (line("1", ["1"] * 12 + ["1e3"]), "integer 13 is '1e3'"),
        (line("1", ["1" * 19]), f"integer 1 is '{'1' * 19}', over 18 digits"),
        (line("1", ["z" * 18]), f"integer 1 is '{'z' * 18}'"),
        (line("1", [], ["0" * 8] * 6 + ["zz"]), "category 7 is 'zz'"),
        (line("1", [], ["0000000g"]), "category 1 is '0000000g'"),
        (line("1", [], [""] * 25 + ["000000001"]), "category 26 is '000000001'"),
        (line("1", [], ["\xff" * 4]), f"category 1 is {chr(0xFF) * 4!r}"),
        (line("x", ["y"], ["z"]), "label 'x' is not 0 or 1"),
        (line("1", ["", "y"], ["z"]), "integer 2 is 'y'"),
        (line("1", ["9" * 60]), f"integer 1 is '{'9' * 40}'..., over 18 digits"),
    ],
)
def test_malformed_line_is_one_unused_row_and_shifts_no_other(bad: bytes, reason: str) -> None:
    good = line("1", ["1", "2"], ["00000001", "00000002"])
    rows = parse_criteo(good + bad + good)
    assert rows.malformed == ((1, reason),)
    assert rows.valid_N.tolist() == [True, False, True]
    assert rows.labels_N.tolist() == [1.0, 0.0, 1.0]
    assert not rows.integers_NI[1].any()
    assert not rows.categories_NF[1].any()
    assert rows.integer_missing_NI[1].all()
    assert rows.category_missing_NF[1].all()
    np.testing.assert_array_equal(rows.categories_NF[0], rows.categories_NF[2])
    np.testing.assert_array_equal(rows.integers_NI[0], rows.integers_NI[2])
    assert rows.categories_NF[2, :2].tolist() == [1, 2]


def test_malformed_lines_are_listed_in_order() -> None:
    rows = parse_criteo(line("x") + b"\n" + line() + line("1", ["q"]) + b"spam\n")
    assert [row for row, _ in rows.malformed] == [0, 1, 3, 4]
    assert rows.valid_N.tolist() == [False, False, True, False, False]


def test_hash_is_the_published_splitmix64() -> None:
    # The first outputs for the seeds 0 and 1234567, as published with the reference implementation.
    outputs = [0xE220A8397B1DCDAF, 6457827717110365317]
    categories = np.array([[0], [1234567]], dtype=np.uint32)
    for num_embeddings in (1, 1000, 1_000_003, 1 << 40):
        ids = hash_categories(categories, [num_embeddings])
        assert ids.dtype == np.int64
        assert ids[:, 0].tolist() == [output % num_embeddings for output in outputs]


def test_hash_gives_the_same_ids_for_ever() -> None:
    categories = np.array([[0x68FD1E64, 0xFFFFFFFF], [0x05DB9164, 0]], dtype=np.uint32)
    ids = hash_categories(categories, [1_000_000, 1 << 32])
    assert ids.tolist() == [[649113, 2951840192], [726352, 2065550767]]


def test_hash_refuses_numbers_that_do_not_fit() -> None:
    categories = np.zeros((2, 3), dtype=np.uint32)
    for wrong in ([1, 2], [1, 0, 2], [1.0, 2.0, 3.0]):
        with pytest.raises(
            ValueError, match="must be 3 positive integers, one for each field, got"
        ):
            hash_categories(categories, wrong)


def test_batch_holds_the_ids_that_are_there() -> None:
    rows = parse_criteo(
        line("1", ["7"], ["0000000a", "0000000b"]) + b"\n" + line("0", [], ["0000000a"])
    )
    batch = click_batch(rows, NUM_EMBEDDINGS)
    (ten, eleven), _ = hash_categories(
        np.array([[10, 11], [0, 0]], dtype=np.uint32), [1000, 1000]
    ).tolist()
    assert batch.sparse.keys() == list(CATEGORY_NAMES)
    assert batch.sparse["C1"].to_dense()[0].tolist() == [ten]
    assert batch.sparse["C1"].lengths().tolist() == [1, 0, 1]
    assert batch.sparse["C2"].lengths().tolist() == [1, 0, 0]
    assert batch.sparse.values().tolist() == [ten, ten, eleven]
    assert batch.sparse.values().dtype == torch.int64
    assert batch.dense_BD.shape == (3, 26)
    assert batch.dense_BD.dtype == torch.float32
    torch.testing.assert_close(
        batch.dense_BD[0], torch.tensor([math.log(8)] + [0.0] * 13 + [1.0] * 12)
    )
    assert batch.labels_B.tolist() == [1.0, 0.0, 0.0]
    assert batch.weights_B.tolist() == [1.0, 0.0, 1.0]


def test_batch_is_looked_up_and_copied_as_torchrec_wants() -> None:
    rows = parse_criteo(numbered(3))
    batch = click_batch(rows, NUM_EMBEDDINGS).to(torch.device("cpu"), non_blocking=True)
    config = EmbeddingBagConfig(
        name="t", embedding_dim=4, num_embeddings=1000, feature_names=list(CATEGORY_NAMES)
    )
    pooled = EmbeddingBagCollection(tables=[config])(batch.sparse)
    assert pooled["C1"].shape == (3, 4)
    assert not pooled["C2"].any()
    assert isinstance(batch, ClickBatch)
