"""Huge pages under tensors: counted by the kernel, and tensors like any others."""

import copy
import gc
import io
import mmap
import re
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import shardemb as se
from shardemb import layouts, optim
from shardemb.env import Env
from shardemb.huge_pages import advise_huge, huge_page_bytes, zeros_huge
from tests.spmd import spmd

needs_huge_pages = pytest.mark.skipif(huge_page_bytes() == 0, reason="no transparent huge pages")
NUM_BYTES = 64 << 20
SHAPE = (NUM_BYTES // 256, 64)


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes on huge pages in the mappings in which a tensor lies."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < end and begin < int(found[2], 16)
        elif inside and (found := re.match(r"AnonHugePages:\s+(\d+) kB", line)):
            total += int(found[1]) << 10
    return total


def mapped_bytes() -> int:
    found = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@needs_huge_pages
def test_rows_of_their_own_lie_on_huge_pages_and_go_back_to_the_system() -> None:
    rows = zeros_huge(SHAPE)
    assert (rows.shape, rows.dtype, rows.data_ptr() % huge_page_bytes()) == (
        SHAPE,
        torch.float32,
        0,
    )
    assert huge_bytes(rows) == 0  # nothing is touched
    assert torch.equal(rows, torch.zeros(SHAPE))
    rows.fill_(1.0)
    assert huge_bytes(rows) == NUM_BYTES
    gc.collect()
    held, view = mapped_bytes(), rows[7:9]
    del rows
    assert mapped_bytes() == held
    del view
    assert mapped_bytes() <= held - NUM_BYTES


@needs_huge_pages
def test_memory_of_others_is_put_on_huge_pages_and_keeps_its_values() -> None:
    # a mapping of its own: memory of the heap may have been under a table, and keeps its advice
    memory = mmap.mmap(-1, NUM_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    rows = torch.frombuffer(memory, dtype=torch.int32).view(SHAPE)
    rows.copy_(torch.arange(NUM_BYTES // 4, dtype=torch.int32).view(SHAPE))
    before = huge_bytes(rows)
    advise_huge(rows[5:9], rows)
    assert huge_bytes(rows) >= before + NUM_BYTES - 2 * huge_page_bytes()
    assert torch.equal(rows.flatten(), torch.arange(NUM_BYTES // 4, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [SHAPE, (3, 5), (0, 4), (NUM_BYTES // 4 + 1,)])
def test_zeros_are_zeros_of_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    zeros = zeros_huge(shape, dtype)
    assert (zeros.shape, zeros.dtype, zeros.is_contiguous()) == (shape, dtype, True)
    assert zeros.untyped_storage().nbytes() == zeros.nbytes
    assert zeros.count_nonzero() == 0


def _add_one(rows: torch.Tensor) -> None:
    torch.set_num_threads(1)
    rows.add_(1.0)


def test_they_are_saved_copied_and_shared_like_other_tensors() -> None:
    rows = zeros_huge(SHAPE)
    rows[3] = 5.0
    parameter = nn.Parameter(rows)
    file = io.BytesIO()
    torch.save({"rows": parameter}, file)
    assert file.tell() < NUM_BYTES + 10_000
    file.seek(0)
    assert torch.equal(torch.load(file)["rows"], rows)
    copied = copy.deepcopy(parameter)
    assert torch.equal(copied, rows)
    assert copied.data_ptr() != rows.data_ptr()
    rows.share_memory_()
    process = mp.get_context("spawn").Process(target=_add_one, args=(rows,))
    process.start()
    process.join()
    assert (float(rows[3, 0]), float(rows[4, 0])) == (6.0, 1.0)


@needs_huge_pages
@pytest.mark.parametrize("layout", ["row_wise", "data_parallel"])
@spmd(world_size=1)
def test_tables_and_their_state_lie_on_huge_pages(env: Env, layout: str) -> None:
    table = se.TableConfig(
        name="t",
        num_embeddings=SHAPE[0],
        embedding_dim=SHAPE[1],
        feature_names=("f",),
        optimizer=optim.Adam(lr=0.1),
    )
    collection = se.EmbeddingBagCollection([table])
    plan = se.plan_sharding(collection, env, {"t": getattr(layouts, layout)()})
    model = se.shard_modules(collection, plan, env)
    weight = model.state_dict()["embedding_bags.t.weight"]
    rows = weight if layout == "data_parallel" else weight.local_tensor()
    assert huge_bytes(rows) >= NUM_BYTES - 2 * huge_page_bytes()
    optimizer = se.build_optimizer(model, dense=None)
    states = optimizer.rows.state_dict()["state"]["embedding_bags.t.weight"].values()
    whole = [each if layout == "data_parallel" else each.local_tensor() for each in states]
    large = [state for state in whole if state.nbytes == NUM_BYTES]
    assert len(large) == 2
    if layout == "row_wise":
        assert all(huge_bytes(state) >= NUM_BYTES - 2 * huge_page_bytes() for state in large)
