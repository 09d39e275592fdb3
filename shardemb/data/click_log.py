"""A click log on disk: which lines train, which are held out, and the batches of them."""

# F = 26 categories, B samples of a rank's batch

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shardemb.agree import all_or_none
from shardemb.data.clicks import CATEGORY_NAMES, ClickBatch, click_batch, hash_categories
from shardemb.data.criteo import FORMAT, NUM_FIELDS, parse_criteo
from shardemb.data.lines import LineIndex, LineRange
from shardemb.env import Env

_NUM_REPORTED = 5
_NUM_PROBED = 100
_COMPRESSED = {".gz", ".zip", ".bz2", ".xz", ".zst"}


@dataclass(frozen=True, kw_only=True)
class CriteoFiles:
    """Which files train and which are held out.

    Attributes:
        train: Files to train on, in reading order.
        held_out: Labelled files to evaluate on; empty when a part of `train` is to be held out.
    """

    train: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CriteoSplit:
    """Which lines train and which are held out.

    Attributes:
        train: Lines to train on.
        held_out: Lines to evaluate on.
    """

    train: LineRange
    held_out: LineRange

    def describe(self) -> str:
        """The files with their bytes and the lines taken of them, as JSON."""
        parts = {
            name: {
                "files": {
                    file.path.name: {
                        "bytes": file.num_bytes,
                        "start_sha256": _start_hash(file.path),
                    }
                    for file in lines.index.files
                },
                "first_line": lines.first,
                "num_lines": lines.num_lines,
            }
            for name, lines in (("train", self.train), ("held_out", self.held_out))
        }
        return json.dumps(parts, indent=2)


def find_criteo(path: Path) -> CriteoFiles:
    """Finds the files of a click log.

    Of a folder, train.txt or train.tsv trains, and the labelled ones of valid* and test* are held
    out: the challenge's own test.txt has no labels and is left out. Without a train file, all of
    *.txt, *.tsv and day_* train, day_2 before day_10.

    Args:
        path: A file, or a folder of files.

    Returns:
        The files.

    Raises:
        ValueError: There is no such path, or the folder does not say what to train on.
    """
    if path.suffix in _COMPRESSED and path.is_file():
        raise ValueError(f"data file '{path}' is compressed; unpack it first")
    if path.is_file():
        return CriteoFiles(train=(path,))
    if not path.is_dir():
        raise ValueError(f"data path '{path}' does not exist; give a file or a folder of files")
    files = sorted((file for file in path.iterdir() if file.is_file()), key=_natural_order)
    texts = [file for file in files if file.suffix in {".txt", ".tsv"}]
    train = [file for file in texts if file.stem == "train"]
    if len(train) > 1:
        raise ValueError(
            f"data folder '{path}' has both train.txt and train.tsv; remove one of them"
        )
    if train:
        named = [file for file in texts if file.name.startswith(("valid", "test"))]
        return CriteoFiles(train=tuple(train), held_out=tuple(filter(_is_labelled, named)))
    for file in files:
        if file.suffix in _COMPRESSED:
            raise ValueError(f"data file '{file}' is compressed; unpack it first")
    days = [file for file in files if file.name.startswith("day_") and file not in texts]
    if not texts and not days:
        raise ValueError(
            f"data folder '{path}' has neither train.txt nor any *.txt, *.tsv or day_* file; give "
            f"a folder of Criteo's files, whose lines hold {FORMAT}"
        )
    return CriteoFiles(train=tuple(sorted(texts + days, key=_natural_order)))


def _natural_order(file: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def _is_labelled(file: Path) -> bool:
    """Whether one of the first lines has a label: not the challenge's own test.txt."""
    with open(file, "rb") as stream:
        first = itertools.islice(stream, _NUM_PROBED)
        return any(line.count(b"\t") == NUM_FIELDS - 1 for line in first)


def _start_hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.sha256(stream.read(1 << 20)).hexdigest()


def open_click_log(path: Path, *, env: Env) -> CriteoSplit:
    """Finds the files of a click log and indexes their lines. Every rank must call it.

    Held out are the files that `find_criteo` says, or else the last tenth of the lines.

    Args:
        path: A file, or a folder of files.
        env: This process.

    Returns:
        The lines to train on and those held out.

    Raises:
        ValueError: There is no click log, one line of it, or its first lines are all malformed.
        OtherRankError: The same, on another rank.
    """
    with all_or_none(env, f"looking for data in {path}"):
        files = find_criteo(path)
    index = LineIndex.build(files.train, env=env)
    if files.held_out:
        held_out = LineIndex.build(files.held_out, env=env)
        split = CriteoSplit(
            train=LineRange(index=index, first=0, num_lines=index.num_lines),
            held_out=LineRange(index=held_out, first=0, num_lines=held_out.num_lines),
        )
    else:
        num_held_out = max(1, index.num_lines // 10)
        num_train = index.num_lines - num_held_out
        split = CriteoSplit(
            train=LineRange(index=index, first=0, num_lines=num_train),
            held_out=LineRange(index=index, first=num_train, num_lines=num_held_out),
        )
    with all_or_none(env, f"looking at the first lines of {path}"):
        if not split.train.num_lines:
            raise ValueError(
                f"data file '{files.train[0]}' has 1 line; give at least 2, one to hold out"
            )
        for lines in (split.train, split.held_out):
            _check_first_lines(lines)
    return split


def _check_first_lines(lines: LineRange) -> None:
    rows = parse_criteo(lines.index.read(lines.first, min(_NUM_PROBED, lines.num_lines)))
    if not rows.valid_N.any():
        file, number = lines.index.locate(lines.first)
        raise ValueError(
            f"{file}:{number}: {rows.malformed[0][1]}, and so on for {len(rows.malformed)} lines; "
            f"give a file in Criteo's format, whose lines hold {FORMAT}"
        )


class CriteoLoader:
    """One rank's part of the batches of some lines, in their order.

    The global batch of step s is samples [s * batch_size, (s + 1) * batch_size), counted through
    the lines again and again, so that the step alone is the position in the data, and every world
    size trains on the same batches. A rank reads its own lines only, one batch at a time.

    Each malformed line counts once, weighs 0, and is one of at most `max_malformed` on this rank.

    Args:
        lines: What to read.
        env: This process.
        batch_size: Samples of a step on all ranks together.
        num_embeddings_F: Rows of each category's table, [26].
        start_step: The first step to read, for going on after a checkpoint.
        num_steps: The step to stop before, counted from 0 and not from `start_step`; None goes on
            to the end of the pass, or for ever.
        repeat: Whether to begin again after the last line. If not, the last batch is padded with
            samples of weight 0, so that all ranks do the same steps.
        max_malformed: Malformed lines after which the data is taken not to be Criteo's.

    Raises:
        ValueError: An argument is out of range or `batch_size` does not divide by the world size;
            while reading, more than `max_malformed` lines are malformed.
    """

    def __init__(
        self,
        lines: LineRange,
        *,
        env: Env,
        batch_size: int,
        num_embeddings_F: npt.ArrayLike,
        start_step: int = 0,
        num_steps: int | None = None,
        repeat: bool = True,
        max_malformed: int = 100,
    ) -> None:
        if batch_size < 1 or batch_size % env.world_size:
            raise ValueError(
                "batch_size must be a positive multiple of the number of ranks, "
                f"{env.world_size}, got {batch_size}"
            )
        if start_step < 0 or max_malformed < 0 or (num_steps is not None and num_steps < 0):
            raise ValueError(
                f"start_step, num_steps and max_malformed must not be negative, got {start_step}, "
                f"{num_steps} and {max_malformed}"
            )
        if not lines.num_lines:
            raise ValueError("lines is an empty range; give at least one line")
        hash_categories(np.zeros((0, len(CATEGORY_NAMES)), dtype=np.uint32), num_embeddings_F)
        self._lines = lines
        self._env = env
        self._batch_size = batch_size
        self._num_embeddings_F = np.asarray(num_embeddings_F)
        self._start_step = start_step
        self._end_step = num_steps
        if not repeat:
            one_pass = -(-lines.num_lines // batch_size)
            self._end_step = one_pass if num_steps is None else min(num_steps, one_pass)
        self._repeat = repeat
        self._max_malformed = max_malformed
        self._malformed_lines: set[int] = set()

    def __iter__(self) -> Iterator[ClickBatch]:
        """Reads from `start_step` on, each time it is called."""
        step = self._start_step
        while self._end_step is None or step < self._end_step:
            yield self._read(step)
            step += 1

    @property
    def malformed_lines(self) -> frozenset[int]:
        """Numbers of the malformed lines that this rank has seen."""
        return frozenset(self._malformed_lines)

    @property
    def num_malformed(self) -> int:
        """Number of malformed lines that this rank has seen, each counted once."""
        return len(self._malformed_lines)

    def _read(self, step: int) -> ClickBatch:
        num_samples = self._batch_size // self._env.world_size
        first = step * self._batch_size + self._env.rank * num_samples
        lines_B = first + np.arange(num_samples)
        if not self._repeat:
            lines_B = lines_B[lines_B < self._lines.num_lines]
        lines_B = self._lines.first + lines_B % self._lines.num_lines
        rows = parse_criteo(self._text(lines_B))
        assert len(rows.labels_N) == len(lines_B)
        for row, reason in rows.malformed:
            self._note_malformed(int(lines_B[row]), reason)
        return click_batch(rows.padded(num_samples), self._num_embeddings_F)

    def _text(self, lines_B: npt.NDArray[np.int64]) -> bytes:
        runs = np.split(lines_B, np.flatnonzero(np.diff(lines_B) != 1) + 1)
        read = self._lines.index.read
        return b"".join(read(int(run[0]), len(run)) for run in runs if len(run))

    def _note_malformed(self, line: int, reason: str) -> None:
        if line in self._malformed_lines:
            return
        self._malformed_lines.add(line)
        path, number = self._lines.index.locate(line)
        if self.num_malformed > self._max_malformed:
            raise ValueError(
                f"{path}:{number}: {reason}; this is malformed line {self.num_malformed}, and "
                f"{self._max_malformed} may be skipped; raise --max-malformed, or give a file in "
                f"Criteo's format, whose lines hold {FORMAT}"
            )
        if self.num_malformed <= _NUM_REPORTED:
            logging.getLogger("shardemb").warning(
                "%s:%d: %s (skipped, %d so far)", path, number, reason, self.num_malformed
            )
