"""Which bytes hold which lines: against reading the files whole."""

import os
from pathlib import Path

import numpy as np
import pytest

from shardemb.data.lines import LineIndex, count_newlines
from shardemb.env import Env
from tests.spmd import spmd

ONE_RANK = Env(rank=0, local_rank=0, world_size=1, num_nodes=1)


def write(folder: Path, *texts: bytes) -> list[Path]:
    paths = [folder / f"part_{number}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    return paths


def test_newlines_of_chosen_blocks_are_counted(tmp_path: Path) -> None:
    (path,) = write(tmp_path, b"a\nbb\n\ncc\nd")
    assert count_newlines(path, [0, 1, 2], block_bytes=4).tolist() == [1, 2, 1]
    assert count_newlines(path, range(1, 3, 2), block_bytes=4).tolist() == [2]


def test_last_line_without_newline_counts_and_empty_trailing_line_does_not(tmp_path: Path) -> None:
    paths = write(tmp_path, b"a\nb", b"c\n", b"\n", b"d")
    index = LineIndex.build(paths, env=ONE_RANK)
    assert index.num_lines == 5
    assert [file.num_bytes for file in index.files] == [3, 2, 1, 1]
    assert index.read(0, 5) == b"a\nb\nc\n\nd\n"


@pytest.mark.parametrize("block_bytes", [1, 2, 5, 64, 1 << 20])
def test_every_range_equals_the_lines_of_the_whole(tmp_path: Path, block_bytes: int) -> None:
    paths = write(
        tmp_path, b"one\n\ntwo\nthree", b"four is longer\r\n", b"5\n6\n\n\n7\n" + b"x" * 40
    )
    index = LineIndex.build(paths, env=ONE_RANK, block_bytes=block_bytes)
    lines = [
        line + b"\n"
        for path in paths
        for line in path.read_bytes().removesuffix(b"\n").split(b"\n")
    ]
    assert index.num_lines == len(lines) == 11
    for first in range(12):
        for count in range(12 - first):
            assert index.read(first, count) == b"".join(lines[first : first + count])


def test_lines_are_located_as_an_editor_counts(tmp_path: Path) -> None:
    first, second = write(tmp_path, b"a\nb", b"c\nd\n")
    index = LineIndex.build([first, second], env=ONE_RANK, block_bytes=2)
    located = [index.locate(line) for line in range(4)]
    assert located == [(first, 1), (first, 2), (second, 1), (second, 2)]
    with pytest.raises(ValueError, match=r"line 4 is not within the 4 lines of .*part_1.txt"):
        index.locate(4)


def test_index_takes_8_bytes_for_each_block(tmp_path: Path) -> None:
    (path,) = write(tmp_path, b"line\n" * 2000)
    index = LineIndex.build([path], env=ONE_RANK, block_bytes=100)
    assert index.lines_before_K.nbytes == 8 * (100 + 1)


def test_what_cannot_be_indexed_is_named(tmp_path: Path) -> None:
    (empty,) = write(tmp_path, b"")
    with pytest.raises(
        ValueError, match=r"'.*part_0.txt' is empty; give a file with at least one line"
    ):
        LineIndex.build([empty], env=ONE_RANK)
    with pytest.raises(ValueError, match=r"'.*absent.txt' cannot be read: No such file"):
        LineIndex.build([tmp_path / "absent.txt"], env=ONE_RANK)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        LineIndex.build([tmp_path], env=ONE_RANK)
    with pytest.raises(ValueError, match="paths is empty"):
        LineIndex.build([], env=ONE_RANK)


def test_lines_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    index = LineIndex.build(write(tmp_path, b"a\nb\n"), env=ONE_RANK)
    with pytest.raises(ValueError, match=r"lines \[1, 3\) are not all within the 2 lines"):
        index.read(1, 2)


@pytest.mark.parametrize(
    ("changed", "is_time_kept", "reason"),
    [
        (b"a\nb\n", True, "it has 4 bytes instead of 6"),
        (b"a\nb\nc\nd\n", True, "it has 8 bytes instead of 6"),
        (b"a\nb\nX\n", False, "it was written to"),
        (b"a\nbbb\n", True, "its lines are not where they were"),
    ],
)
def test_file_that_changes_after_the_index_is_named(
    tmp_path: Path, changed: bytes, is_time_kept: bool, reason: str
) -> None:
    (path,) = write(tmp_path, b"a\nb\nc\n")
    index = LineIndex.build([path], env=ONE_RANK)
    assert index.read(1, 1) == b"b\n"
    before = path.stat().st_mtime_ns
    path.write_bytes(changed)
    os.utime(path, ns=(before, before + (not is_time_kept)))
    with pytest.raises(RuntimeError, match=f"part_0.txt' changed since it was indexed: {reason}"):
        index.read(1, 1)


def test_file_that_disappears_is_named(tmp_path: Path) -> None:
    (path,) = write(tmp_path, b"a\n")
    index = LineIndex.build([path], env=ONE_RANK)
    path.unlink()
    with pytest.raises(RuntimeError, match=r"part_0.txt' changed .* cannot be read: No such file"):
        index.read(0, 1)


@spmd(world_size=3)
def test_ranks_share_the_counting_and_the_errors(env: Env, tmp_path: Path) -> None:
    texts = [b"one\ntwo\n\nthree", b"four\n" * 9, b"5"]
    folder = tmp_path / str(env.rank)
    folder.mkdir()
    paths = write(folder, *texts)
    mine = LineIndex.build(paths, env=env, block_bytes=4)
    alone = LineIndex.build(paths, env=ONE_RANK, block_bytes=4)
    np.testing.assert_array_equal(mine.lines_before_K, alone.lines_before_K)
    assert mine.read(2, 9) == b"\nthree\n" + b"four\n" * 7

    if env.rank == 1:
        paths[1].unlink()
    with pytest.raises((ValueError, RuntimeError), match=r"part_1.txt' cannot be read"):
        LineIndex.build(paths, env=env)

    paths[1].write_bytes(b"other\n" if env.rank == 2 else b"four\n")
    with pytest.raises(RuntimeError, match=r"rank 2 sees the files .* give every rank the same"):
        LineIndex.build(paths, env=env)
