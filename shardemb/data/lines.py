"""Which bytes of a list of text files hold which lines. Knows nothing of what the lines say.

Any rank reads lines [first, first + count) of the files put end to end, and only the blocks that
hold them.
"""

# F files, K blocks: a file is cut into blocks of block_bytes, numbered through all files.

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from shardemb.agree import all_or_none, by_main
from shardemb.env import Env
from shardemb.errors import RunError

_NEWLINE = ord("\n")


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A file as it was when it was indexed.

    Attributes:
        path: Where it is.
        num_bytes: Its size.
        modified_ns: Its modification time, by which a later change is noticed.
        is_open_ended: Whether its last line has no newline.
    """

    path: Path
    num_bytes: int
    modified_ns: int
    is_open_ended: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class LineIndex:
    """Where the lines of text files are: 8 bytes of memory for each block of the files.

    A last line without a newline counts; the nothing after a last newline does not.

    Attributes:
        files: The files, in reading order.
        block_bytes: Size of a block.
        first_block_F: int64 [F + 1], first block of each file, then the number of blocks.
        lines_before_K: int64 [K + 1], lines that end before each block, then the number of lines.
    """

    files: tuple[TextFile, ...]
    block_bytes: int
    first_block_F: npt.NDArray[np.int64]
    lines_before_K: npt.NDArray[np.int64]

    @classmethod
    def build(cls, paths: Sequence[Path], *, env: Env, block_bytes: int = 1 << 20) -> Self:
        r"""Counts the lines of files, each rank every world_size-th block. Every rank must call it.

        Args:
            paths: The files in reading order, the same on every rank.
            env: This process.
            block_bytes: Size of a block.

        Returns:
            The same index on every rank.

        Raises:
            ValueError: No file is given, or one is missing, empty or unreadable.
            RunError: A file changed meanwhile, or another rank sees other files or failed.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp()) / "log.txt"
            >>> _ = path.write_bytes(b"a\nb\nc")
            >>> LineIndex.build([path], env=Env()).read(1, 2)
            b'b\nc\n'
        """
        with all_or_none(env, "opening the data files"):
            if not paths:
                raise ValueError("paths is empty; give at least one text file")
            files = tuple(_open_file(Path(path)) for path in paths)
        seen_by_main = by_main(env, "opening the data files", lambda: _facts(files))
        blocks_F = [-(-file.num_bytes // block_bytes) for file in files]
        first_block_F = np.concatenate([[0], np.cumsum(blocks_F, dtype=np.int64)])
        lines_K = np.zeros(first_block_F[-1], dtype=np.int64)
        with all_or_none(env, "counting the lines of the data files"):
            if seen_by_main != _facts(files):
                raise RunError(
                    f"rank {env.rank} sees the files {_facts(files)} (name, bytes, open-ended), "
                    f"rank 0 sees {seen_by_main}; give every rank the same files"
                )
            for file, first_block, num_blocks in zip(files, first_block_F, blocks_F, strict=False):
                mine = range(
                    (env.rank - int(first_block)) % env.world_size, num_blocks, env.world_size
                )
                counts = count_newlines(file.path, mine, block_bytes=block_bytes)
                lines_K[first_block + np.asarray(mine, dtype=np.int64)] = counts
                _check_unchanged(file, os.stat(file.path))
        if env.world_size > 1:
            dist.all_reduce(torch.from_numpy(lines_K))
        lines_K[first_block_F[1:] - 1] += [file.is_open_ended for file in files]
        return cls(
            files=files,
            block_bytes=block_bytes,
            first_block_F=first_block_F,
            lines_before_K=np.concatenate([[0], np.cumsum(lines_K)]),
        )

    @property
    def num_lines(self) -> int:
        """Number of lines of all files."""
        return int(self.lines_before_K[-1])

    def read(self, first: int, count: int) -> bytes:
        """Reads whole lines, across files where need be.

        A file that changed since it was indexed is a RunError.

        Args:
            first: Number of the first line, from 0.
            count: Number of lines.

        Returns:
            `count` lines, each ending in a newline, also where the file's last one has none.

        Raises:
            ValueError: Some of the lines do not exist.
        """
        if first < 0 or count < 0 or first + count > self.num_lines:
            raise ValueError(
                f"lines [{first}, {first + count}) are not all within the {self.num_lines} lines "
                f"of {self._names()}"
            )
        pieces = []
        line, end = first, first + count
        while line < end:
            file = self._file_of(line)
            piece_end = min(end, self._first_line(file + 1))
            pieces.append(self._read_file(file, line, piece_end))
            line = piece_end
        return b"".join(pieces)

    def locate(self, line: int) -> tuple[Path, int]:
        """Says where a line is, as an editor counts.

        Args:
            line: Number of the line, from 0.

        Returns:
            The file, and the line's number in it, from 1.

        Raises:
            ValueError: There is no such line.
        """
        if not 0 <= line < self.num_lines:
            raise ValueError(
                f"line {line} is not within the {self.num_lines} lines of {self._names()}"
            )
        file = self._file_of(line)
        return self.files[file].path, line - self._first_line(file) + 1

    def _names(self) -> str:
        return ", ".join(str(file.path) for file in self.files)

    def _first_line(self, file: int) -> int:
        return int(self.lines_before_K[self.first_block_F[file]])

    def _file_of(self, line: int) -> int:
        block = self._block_of_end(line + 1)
        return int(np.searchsorted(self.first_block_F, block, side="right")) - 1

    def _block_of_end(self, nth: int) -> int:
        """The block that holds the nth line end, from 1."""
        return int(np.searchsorted(self.lines_before_K, nth, side="left")) - 1

    def _read_file(self, number: int, first: int, end: int) -> bytes:
        file, file_block = self.files[number], int(self.first_block_F[number])
        at_start = first == self._first_line(number)
        first_block = file_block if at_start else self._block_of_end(first)
        last_block = self._block_of_end(end)
        data = self._read_blocks(file, first_block - file_block, last_block - file_block)
        lines_before, lines_after = self.lines_before_K[[first_block, last_block + 1]].tolist()
        if data.count(b"\n") != lines_after - lines_before:
            raise RunError(_changed(file, "its lines are not where they were"))
        head = data[: self.block_bytes]
        start = 0 if at_start else _after_newline(head, first - lines_before)
        last_at = (last_block - first_block) * self.block_bytes
        nth = end - int(self.lines_before_K[last_block])
        return data[start : last_at + _after_newline(data[last_at:], nth)]

    def _read_blocks(self, file: TextFile, first: int, last: int) -> bytes:
        begin, end = first * self.block_bytes, min((last + 1) * self.block_bytes, file.num_bytes)
        try:
            with open(file.path, "rb") as stream:
                _check_unchanged(file, os.fstat(stream.fileno()))
                stream.seek(begin)
                data = stream.read(end - begin)
        except OSError as error:
            raise RunError(_changed(file, f"it cannot be read: {error.strerror}")) from error
        if len(data) != end - begin:
            raise RunError(_changed(file, f"it ends before byte {end}"))
        return data + b"\n" if end == file.num_bytes and file.is_open_ended else data


@dataclass(frozen=True, kw_only=True)
class LineRange:
    """Some consecutive lines of an index.

    Attributes:
        index: Where the lines are.
        first: Number of the first line in the index, from 0.
        num_lines: How many there are.
    """

    index: LineIndex
    first: int
    num_lines: int

    def __str__(self) -> str:
        names = [file.path.name for file in self.index.files]
        shown = ", ".join(names[:3]) + f" and {len(names) - 3} more files" * (len(names) > 3)
        return f"{self.num_lines:,} lines of {shown}"


def count_newlines(path: Path, blocks: Sequence[int], *, block_bytes: int) -> npt.NDArray[np.int64]:
    """Counts the newlines in some blocks of a file, and reads nothing else of it.

    Args:
        path: The file.
        blocks: Numbers of the blocks, from 0.
        block_bytes: Size of a block; the file's last one may be shorter.

    Returns:
        int64 [len(blocks)].
    """
    counts = np.zeros(len(blocks), dtype=np.int64)
    with open(path, "rb", buffering=0) as stream:
        for at, block in enumerate(blocks):
            stream.seek(block * block_bytes)
            counts[at] = stream.read(block_bytes).count(b"\n")
    return counts


def _open_file(path: Path) -> TextFile:
    try:
        with open(path, "rb") as stream:
            stat = os.fstat(stream.fileno())
            if not stat.st_size:
                raise ValueError(f"data file '{path}' is empty; give a file with at least one line")
            stream.seek(-1, os.SEEK_END)
            is_open_ended = stream.read(1) != b"\n"
    except OSError as error:
        raise ValueError(
            f"data file '{path}' cannot be read: {error.strerror}; give a readable text file"
        ) from error
    return TextFile(
        path=path,
        num_bytes=stat.st_size,
        modified_ns=stat.st_mtime_ns,
        is_open_ended=is_open_ended,
    )


def _facts(files: Sequence[TextFile]) -> list[tuple[str, int, bool]]:
    return [(file.path.name, file.num_bytes, file.is_open_ended) for file in files]


def _check_unchanged(file: TextFile, stat: os.stat_result) -> None:
    if stat.st_size != file.num_bytes:
        how = f"it has {stat.st_size} bytes instead of {file.num_bytes}"
        raise RunError(_changed(file, how))
    if stat.st_mtime_ns != file.modified_ns:
        raise RunError(_changed(file, "it was written to"))


def _changed(file: TextFile, how: str) -> str:
    return f"data file '{file.path}' changed since it was indexed: {how}; leave it be, start again"


def _after_newline(data: bytes, nth: int) -> int:
    """Position after the nth newline, from 1."""
    return int(np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == _NEWLINE)[nth - 1]) + 1
