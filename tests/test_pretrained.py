"""Rows that are given: read in blocks, whatever holds them, and refused where they do not fit."""

# R rows, D width

import copy
import ctypes
import json
import math
import mmap
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.init import Init, Normal, Pretrained
from shardemb.layouts import Layout
from shardemb.modules.initial_values import InitialValues
from tests.every_layout import whole_table
from tests.spmd import spmd

NUM_ROWS, WIDTH = 300, 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REST = Normal(std=0.5)


def given(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(NUM_ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def every_form(folder: Path, dtype: torch.dtype) -> dict[str, Pretrained]:
    """The same weights in every form that holds the dtype."""
    weights_RD = given(dtype)
    file = folder / "w.safetensors"
    save_file({"other": torch.ones(3), "w": weights_RD}, file)
    forms = {
        "tensor": Pretrained(weights=weights_RD, rest=REST),
        "transposed": Pretrained(weights=torch.nn.Parameter(weights_RD.T.clone()).T, rest=REST),
        "safetensors": Pretrained(weights=file, tensor="w", rest=REST),
    }
    if dtype != torch.bfloat16:
        array_RD = weights_RD.numpy()
        np.save(folder / "c.npy", array_RD)
        np.save(folder / "f.npy", np.asfortranarray(array_RD))
        np.save(folder / "swapped.npy", array_RD.astype(array_RD.dtype.newbyteorder()))
        forms |= {
            "array": Pretrained(weights=array_RD, rest=REST),
            "memmap": Pretrained(weights=np.load(folder / "c.npy", mmap_mode="r"), rest=REST),
            **{
                name: Pretrained(weights=str(folder / f"{name}.npy"), rest=REST)
                for name in ("c", "f", "swapped")
            },
        }
    return forms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_block_is_that_of_the_weights_with_drawn_rows_behind(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    expected_RD = given(dtype).float().numpy()
    drawn_RD = REST.rows(seed=3, table="t", first_row=0, num_rows=NUM_ROWS + 9, embedding_dim=WIDTH)
    expected_RD = np.concatenate([expected_RD, drawn_RD[NUM_ROWS:]])
    forms = every_form(tmp_path, dtype)
    for name, init in forms.items():
        assert (init.shape, init.dtype) == ((NUM_ROWS, WIDTH), str(dtype)[6:]), name
        for first, count in ((0, NUM_ROWS + 9), (7, 5), (NUM_ROWS - 1, 3), (NUM_ROWS, 9)):
            for columns in (slice(None), slice(4, 8)):
                block = init.rows(
                    seed=3,
                    table="t",
                    first_row=first,
                    num_rows=count,
                    embedding_dim=WIDTH,
                    columns=columns,
                )
                assert block.dtype == np.float32
                assert block.flags.writeable
                assert np.array_equal(block, expected_RD[first : first + count, columns]), name
    assert len({repr(init) for init in forms.values()}) == len(set(forms.values())) == 1


def test_what_ranks_compare_tells_weights_apart_and_not_where_they_lie(tmp_path: Path) -> None:
    weights_RD = given()
    init = Pretrained(weights=weights_RD)
    np.save(tmp_path / "here.npy", weights_RD.numpy())
    assert repr(Pretrained(weights=tmp_path / "here.npy")) == repr(init)
    assert "digest" in repr(init)
    changed = [Pretrained(weights=weights_RD.flip(1))]
    for row in (0, NUM_ROWS - 1):
        other_RD = weights_RD.clone()
        other_RD[row, 3] += 1
        changed.append(Pretrained(weights=other_RD))
    changed += [
        Pretrained(weights=weights_RD.double()),
        Pretrained(weights=weights_RD.view(-1, 4)),
        Pretrained(weights=weights_RD, rest=REST),
    ]
    assert len({repr(each) for each in (init, *changed)}) == 7
    assert copy.deepcopy(init).weights is weights_RD


def save_npy(path: Path, array: Any) -> Path:
    np.save(path, array, allow_pickle=True)
    return path


def cut(path: Path) -> Path:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 40)
    return path


def two_tensors(folder: Path) -> Path:
    file = folder / "two.safetensors"
    save_file(
        {"user.weight": torch.ones(4, 8), "item.weight": torch.ones(4, 8, dtype=torch.int64)}, file
    )
    return file


def pickled(path: Path) -> Path:
    torch.save(torch.ones(2), path)
    return path


REFUSED: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (
        lambda _: {"weights": [[1.0]]},
        "must be a path, a NumPy array or a plain torch tensor, got l",
    ),
    (
        lambda _: {"weights": torch.ones(2, 4).int()},
        "a torch tensor: weights must be float32, .* i",
    ),
    (lambda _: {"weights": np.ones((2, 4), np.int64)}, "float64, got int64; convert them"),
    (lambda _: {"weights": np.ones(4)}, r"weights must have rows and columns, .* got shape \[4\]"),
    (lambda _: {"weights": torch.ones(0, 4)}, r"got shape \[0, 4\]"),
    (lambda _: {"weights": torch.ones(2, 4, device="meta")}, "that holds numbers, and it is on me"),
    (lambda _: {"weights": torch.ones(2, 4).to_sparse()}, "and it has layout torch.sparse_coo"),
    (lambda _: {"weights": np.ma.ones((2, 4))}, "got MaskedArray; make one of it"),
    (lambda _: {"weights": np.ones((2, 4)), "rest": 0.5}, "rest must be a distribution .* got 0.5"),
    (lambda _: {"weights": np.ones((2, 4)), "tensor": "w"}, "tensor='w' names a tensor of a .safe"),
    (lambda f: {"weights": f / "w.pt"}, r"must end with .npy or .safetensors; .* torch\.load\("),
    (lambda f: {"weights": pickled(f / "w.npy")}, "does not begin as a .npy file does, it may be"),
    (lambda f: {"weights": save_npy(f / "w.npy", [[1, None]])}, "it holds pickled objects, which"),
    (lambda f: {"weights": cut(save_npy(f / "w.npy", np.ones((9, 8))))}, "ends before its last ro"),
    (lambda f: {"weights": save_npy(f / "w.npy", np.ones((9, 8), np.uint8))}, "w.npy': .* got uin"),
    (lambda f: {"weights": cut(two_tensors(f)), "tensor": "user.weight"}, "is no whole .safetenso"),
    (lambda f: {"weights": two_tensors(f)}, "two.safetensors' holds more than one tensor; name on"),
    (
        lambda f: {"weights": two_tensors(f), "tensor": "usr.weight"},
        r"holds no tensor 'usr\.weight'; .* did you mean 'user\.weight'\?",
    ),
    (
        lambda f: {"weights": two_tensors(f), "tensor": "item.weight"},
        r"tensor 'item.weight' of '.*two\.safetensors': weights must be .* got I64",
    ),
]


@pytest.mark.parametrize(("arguments", "text"), REFUSED)
def test_weights_that_cannot_be_rows_are_refused(
    tmp_path: Path, arguments: Callable[[Path], dict[str, Any]], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        Pretrained(**arguments(tmp_path))


def test_a_file_that_is_not_there_or_not_the_same_any_more_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    with pytest.raises(
        FileNotFoundError, match=r"there is no file '.*w\.npy' to read weights from"
    ):
        Pretrained(weights=path)
    init = Pretrained(weights=save_npy(path, np.ones((9, 8))))
    save_npy(path, np.ones((9, 4)))
    with pytest.raises(
        RunError, match=r"w.npy' is float64 \[9, 4\], and was float64 \[9, 8\] when its table was"
    ):
        init.rows(seed=0, table="t", first_row=0, num_rows=1, embedding_dim=8)


def test_without_safetensors_the_command_that_installs_it_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import numpy as np\nfrom shardemb.init import Pretrained\n"
        "Pretrained(weights=np.ones((1, 4)))\n"
        "Pretrained(weights=sys.argv[1], tensor='user.weight')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(two_tensors(tmp_path))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RunError: reading '" in done.stderr
    assert "needs the package safetensors; python -m pip install safetensors" in done.stderr


def table(init: Init | None, **fields: Any) -> se.TableConfig:
    shape: dict[str, Any] = {"num_embeddings": NUM_ROWS, "embedding_dim": WIDTH}
    names: dict[str, Any] = {"name": "t", "feature_names": ("t",)}
    return se.TableConfig(init=init, **shape | names | fields)


def test_a_table_of_another_shape_is_refused_where_it_is_declared(tmp_path: Path) -> None:
    path = save_npy(tmp_path / "w.npy", given().numpy())
    init = Pretrained(weights=path)
    who = re.escape(f"its weights ('{path}') have")
    with pytest.raises(ValueError, match=f"embedding_dim 16, and {who} 8 columns; set embedding_"):
        table(init, embedding_dim=16)
    with pytest.raises(ValueError, match=f"table 't' has 299 rows, and {who} 300; set num_embedd"):
        table(init, num_embeddings=NUM_ROWS - 1)
    with pytest.raises(ValueError, match=f"has 310 rows, and {who} 300; say what draws the other"):
        table(init, num_embeddings=NUM_ROWS + 10)
    assert table(Pretrained(weights=path, rest=REST), num_embeddings=NUM_ROWS + 10).init


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (1e6, "float16", "table 't': row 200 starts with inf as float16; mend"),
        (math.nan, "float32", "row 200 starts with nan as float32"),
        (1e300, "float32", "row 200 starts with inf as float32"),
    ],
)
def test_a_row_that_its_table_cannot_hold_is_named(value: float, dtype: str, text: str) -> None:
    weights_RD = given(torch.float64)
    weights_RD[200, 5] = value
    for weights in (weights_RD, weights_RD.numpy()):
        declared = table(Pretrained(weights=weights), dtype=dtype)
        with pytest.raises(ValueError, match=text):
            se.EmbeddingBagCollection([declared], device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_collection_on_cpu_starts_with_the_weights_in_its_dtype(
    tmp_path: Path, dtype: str
) -> None:
    num_rows = NUM_ROWS + 10
    for form, init in every_form(tmp_path, torch.float64).items():
        declared = table(init, num_embeddings=num_rows, dtype=dtype)
        collection = se.EmbeddingBagCollection([declared], seed=3, device="cpu")
        drawn_RD = REST.rows(seed=3, table="t", first_row=0, num_rows=num_rows, embedding_dim=WIDTH)
        expected_RD = torch.cat([given(torch.float64), torch.from_numpy(drawn_RD[NUM_ROWS:])])
        weight_RD = collection.embedding_bags["t"].weight
        assert torch.equal(weight_RD, expected_RD.to(weight_RD.dtype)), form
        assert str(weight_RD.dtype) == f"torch.{dtype}"


def test_a_padding_row_starts_as_zeros_unless_it_is_given() -> None:
    def start(init: Init | None, padding_idx: int | None) -> torch.Tensor:
        declared = table(init, num_embeddings=NUM_ROWS + 10, padding_idx=padding_idx)
        weight_RD: torch.Tensor = (
            se.EmbeddingCollection([declared], device="cpu").embeddings["t"].weight.detach()
        )
        return weight_RD

    for init in (None, REST, Pretrained(weights=given(), rest=REST)):
        without_RD = start(init, None)
        for padding_idx in (4, -1):
            expected_RD = without_RD.clone()
            if not (padding_idx == 4 and isinstance(init, Pretrained)):
                expected_RD[padding_idx] = 0
                assert not torch.equal(expected_RD, without_RD)
            assert torch.equal(start(init, padding_idx), expected_RD)


def sparse_files(folder: Path, num_rows: int, width: int) -> dict[str, Pretrained]:
    """Files of zeros that take no room on the disk, whatever their size."""
    num_bytes = num_rows * width * 4
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [num_rows, width], "data_offsets": [0, num_bytes]}}
    ).encode()
    with (folder / "large.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + num_bytes)
    np.lib.format.open_memmap(folder / "large.npy", "w+", np.float32, (num_rows, width)).flush()
    return {name: Pretrained(weights=folder / name) for name in ("large.npy", "large.safetensors")}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """An init that notes how much memory the process holds when the next rows are asked for."""

    def __init__(self, init: Pretrained) -> None:
        self.init, self.peak = init, 0

    def rows(self, **block: Any) -> Any:
        drawn = self.init.rows(**block)
        self.peak = max(self.peak, resident_bytes())
        return drawn


def pages_in_memory(path: Path) -> npt.NDArray[np.bool_]:
    """Which pages of a file anyone on this machine has read and not yet forgotten."""
    with path.open("rb") as file:
        mapped = np.memmap(file, np.uint8, "r")
    found: npt.NDArray[np.uint8] = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    address = mapped.ctypes.data
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mincore(
        ctypes.c_void_p(address - address % mmap.PAGESIZE),
        ctypes.c_size_t(len(mapped)),
        ctypes.c_void_p(found.ctypes.data),
    )
    assert not failed, ctypes.get_errno()
    in_memory: npt.NDArray[np.bool_] = found % 2 == 1
    return in_memory


def test_filling_a_shard_neither_reads_nor_holds_the_rest_of_a_file(tmp_path: Path) -> None:
    num_rows, width = 1 << 20, 1 << 10
    shard_RD = torch.ones(1 << 14, width)  # 64 MiB of 4 GiB
    narrow_RD = torch.ones(1 << 14, 4)
    for name, init in sparse_files(tmp_path, num_rows, width).items():
        path = tmp_path / name
        assert path.stat().st_size > 4 << 30 > 1000 * 512 * path.stat().st_blocks
        before = pages_in_memory(path)
        assert before.mean() < 0.1  # what the digest read, and what the system read ahead of it
        peak = Peak(init)
        initial = InitialValues("t", peak, seed=0)  # type: ignore[arg-type]
        for block, column in ((shard_RD, 0), (narrow_RD, 8)):
            resident = resident_bytes()
            initial.fill(block, first_row=1 << 19, first_column=column, embedding_dim=width)
            assert not block.any()
            assert peak.peak - resident < 16 << 20
        newly = np.flatnonzero(pages_in_memory(path) & ~before) * mmap.PAGESIZE
        first, last = (1 << 19) * width * 4, ((1 << 19) + len(shard_RD)) * width * 4
        assert len(newly) * mmap.PAGESIZE > 32 << 20
        read_ahead = 64 << 20  # by the system, which is usually asked for .1 to 15 MiB
        assert first - read_ahead < newly.min() < newly.max() < last + read_ahead


def pretrained_tables(folder: Path, *, sequence: bool = False) -> list[se.TableConfig]:
    """A table in each form, with rows behind those that are given, and a padding row there."""
    return [
        table(
            init,
            name=form,
            num_embeddings=NUM_ROWS + 10,
            feature_names=(form,),
            padding_idx=NUM_ROWS + 2,
            optimizer=optim.SGD(lr=0.1),
            dtype="float16" if form == "c" and not sequence else "float32",
        )
        for form, init in every_form(folder, torch.float64).items()
    ]


@spmd(world_size=2)
def test_sharded_tables_start_as_the_unsharded_bit_for_bit(env: Env, tmp_path: Path) -> None:
    folder = tmp_path / str(env.rank)  # paths may differ between nodes
    folder.mkdir()
    where: list[Layout] = [
        layouts.row_wise(),
        layouts.table_wise(rank=1),
        layouts.column_wise(ranks=[1, 0]),
        layouts.data_parallel(),
    ]
    for build in (se.EmbeddingBagCollection, se.EmbeddingCollection):
        tables = pretrained_tables(folder, sequence=build is se.EmbeddingCollection)
        whole = build(tables, seed=3, device="cpu").state_dict()
        for layout in where:
            if isinstance(layout, layouts.DataParallel):
                tables = [each for each in tables if each.dtype == "float32"]
            model = build(tables, seed=3)
            plan = se.plan_sharding(model, env, {each.name: layout for each in tables})
            state = se.shard_modules(model, plan, env).state_dict()
            for name, weight in state.items():
                expected_RD = whole[name]
                assert expected_RD[:NUM_ROWS].any()
                assert not expected_RD[NUM_ROWS + 2].any()
                assert torch.equal(whole_table(weight, expected_RD), expected_RD), (layout, name)


@spmd(world_size=2)
def test_ranks_with_other_weights_or_a_row_that_cannot_be_are_stopped_together(env: Env) -> None:
    def shard(weights_RD: torch.Tensor) -> None:
        model = se.EmbeddingBagCollection([table(Pretrained(weights=weights_RD))])
        plan = se.plan_sharding(model, env, {"t": layouts.row_wise()})
        se.shard_modules(model, plan, env)

    with pytest.raises(RunError, match="rank 1 has another plan, other tables, weights or seed"):
        shard(given() + env.rank)
    bad_RD = given()
    bad_RD[-2] = math.nan
    kind, text = (
        (ValueError, "row 298 starts with nan") if env.rank else (RunError, "rank 1 failed")
    )
    with pytest.raises(kind, match=text):
        shard(bad_RD)
    shard(given())
