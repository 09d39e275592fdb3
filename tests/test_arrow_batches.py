"""Batches of Arrow columns: slices, chunks, nulls and every type of list, as Python reads them."""

import random
import subprocess
import sys
from typing import Any

import pyarrow as pa
import pytest

import shardemb as se

TABLES = [se.TableConfig(name="t", num_embeddings=1000, embedding_dim=4, feature_names=("x",))]
HASHED = [
    se.TableConfig(
        name="t", num_embeddings=1000, embedding_dim=4, feature_names=("x",), out_of_range="hash"
    )
]
LISTS = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)


def random_bags(draw: random.Random, *, nulls: bool) -> list[list[int | None] | None]:
    bags: list[list[int | None] | None] = []
    for _ in range(draw.choice([1, 5, 30])):
        length = draw.choice([0, 0, 1, 2, 5])
        bag = [
            None if nulls and draw.random() < 0.2 else draw.randrange(120) for _ in range(length)
        ]
        bags.append(None if nulls and draw.random() < 0.2 else bag)
    return bags


def columns(bags: list[Any], leaf: Any) -> dict[str, Any]:
    """A column of bags in every type of list, also as a slice and in chunks."""
    found: dict[str, Any] = {}
    for kind in LISTS:
        column = pa.array(bags, type=kind(leaf))
        around = pa.array([[7, 8], *bags, None, [9]], type=kind(leaf))
        found[kind.__name__] = column
        found[f"{kind.__name__}, sliced"] = around.slice(1, len(bags))
        cut = len(bags) // 2
        found[f"{kind.__name__}, in chunks"] = pa.chunked_array(
            [around.slice(1, cut), pa.array([], type=kind(leaf)), column[cut:]]
        )
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("leaf", [pa.int64(), pa.int8(), pa.uint64()])
def test_list_columns_are_read_as_python_reads_them(seed: int, leaf: Any) -> None:
    draw = random.Random(seed)
    bags = random_bags(draw, nulls=seed % 2 == 1)
    expected = [[row for row in bag or [] if row is not None] for bag in bags]
    weights = [
        None if bag is None else [None if row is None else row / 4 for row in bag] for bag in bags
    ]
    weights_of = columns(weights, pa.float32())
    for form, column in columns(bags, leaf).items():
        assert column.to_pylist() == bags
        batch = se.keyed_jagged_tensor({"x": column}, TABLES, weights={"x": weights_of[form]})
        assert batch.values().tolist() == [row for bag in expected for row in bag], form
        assert batch.lengths().tolist() == [len(bag) for bag in expected], form
        assert batch.weights().tolist() == [row / 4 for bag in expected for row in bag], form


def test_fixed_size_lists_and_what_lies_under_a_null() -> None:
    column = pa.array([[1, 2], None, [3, None], [5, 6]], type=pa.list_(pa.int32(), 2))
    batch = se.keyed_jagged_tensor({"x": column}, TABLES)
    assert batch.values().tolist() == [1, 2, 3, 5, 6]
    assert batch.lengths().tolist() == [2, 0, 1, 2]
    sliced = se.keyed_jagged_tensor({"x": column[1:3]}, TABLES)
    assert (sliced.values().tolist(), sliced.lengths().tolist()) == ([3], [0, 1])
    hidden = pa.ListArray.from_arrays(
        pa.array([0, 2, 3]), pa.array([777, 888, 9]), mask=pa.array([True, False])
    )
    batch = se.keyed_jagged_tensor({"x": hidden}, TABLES)
    assert (batch.values().tolist(), batch.lengths().tolist()) == ([9], [0, 1])
    for nothing in (pa.array([[], []]), pa.array([[], None]), pa.array([None, None])):
        batch = se.keyed_jagged_tensor({"x": nothing}, TABLES)
        assert (batch.values().tolist(), batch.lengths().tolist()) == ([], [0, 0])


def test_a_plain_column_is_one_id_a_sample_and_a_null_is_none() -> None:
    column = pa.chunked_array(
        [pa.array([3, None], type=pa.int16()), pa.array([5], type=pa.int16())]
    )
    for given in (column, column.combine_chunks(), pa.array([1, 3, None, 5])[1:]):
        batch = se.keyed_jagged_tensor({"x": given}, TABLES)
        assert (batch.values().tolist(), batch.lengths().tolist()) == ([3, 5], [1, 0, 1])
    empty = se.keyed_jagged_tensor({"x": pa.chunked_array([], type=pa.list_(pa.int64()))}, TABLES)
    assert empty.lengths().tolist() == []
    offsets = pa.array([0, 1, 1])
    batch = se.keyed_jagged_tensor({"x": (pa.array([3, 5]), offsets)}, TABLES)
    assert (batch.values().tolist(), batch.lengths().tolist()) == ([3, 5], [1, 0, 1])


def test_strings_are_hashed_as_those_of_lists() -> None:
    bags = [["tea", "milk"], [], ["tea", "Çay"]]
    expected = se.keyed_jagged_tensor({"x": bags}, HASHED)
    leaves = (
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
    )
    for leaf in leaves:
        column = pa.array(bags, type=pa.list_(leaf))
        batch = se.keyed_jagged_tensor({"x": column}, HASHED)
        assert batch.values().tolist() == expected.values().tolist(), leaf
        assert batch.lengths().tolist() == [2, 0, 2]
        plain = se.keyed_jagged_tensor({"x": pa.array(["milk", None, "tea"], type=leaf)}, HASHED)
        assert plain.values().tolist() == expected.values()[[1, 0]].tolist()
        assert plain.lengths().tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([[1], [0.5]]), "feature 'x', sample 0: ids must be integers, or strings for a"),
        (pa.array([[], [None], [0.5]]), "feature 'x', sample 2: ids must be integers, or strings"),
        (pa.array([[True]]), "feature 'x': a column must hold integers or strings, .* got bool"),
        (pa.array([[[1]]]), "feature 'x': a column must hold integers .* got list<item: int64>"),
        (pa.array([[1], [2**63]], type=pa.list_(pa.uint64())), "sample 1: id 9223372036854775808"),
        (pa.array([[1], None, [1000]]), "feature 'x', sample 2: id 1000 is outside 0..999"),
        (pa.array([["a"]]), "sample 0: id 'a' is a string, and table 't' has out_of_range='raise'"),
        (
            pa.scalar([1]),
            "feature 'x': a column must be an Arrow Array or ChunkedArray, got ListSc",
        ),
        (
            pa.table({"x": [1]}),
            "a column must be an Arrow Array or ChunkedArray, got Table; take o",
        ),
    ],
)
def test_a_column_of_another_type_is_refused(column: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        se.keyed_jagged_tensor({"x": column}, TABLES)


def test_a_null_weight_of_an_id_is_refused() -> None:
    ids = pa.array([[1], None, [2, 3]])
    weights = pa.array([[0.5], [], [0.5, None]])
    with pytest.raises(ValueError, match="weights of feature 'x', sample 2: a weight is null, and"):
        se.keyed_jagged_tensor({"x": ids}, TABLES, weights={"x": weights})
    with pytest.raises(ValueError, match="weights of feature 'x', sample 1: there are 1 for 0 ids"):
        se.keyed_jagged_tensor({"x": ids}, TABLES, weights={"x": [[0.5], [1.0], [1, 2]]})


def test_pyarrow_is_imported_by_nobody_but_the_user() -> None:
    code = (
        "import sys, shardemb as se\n"
        "t = se.TableConfig(name='t', num_embeddings=9, embedding_dim=4, feature_names=('x',))\n"
        "se.keyed_jagged_tensor({'x': [[1]]}, [t])\n"
        "print('pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
