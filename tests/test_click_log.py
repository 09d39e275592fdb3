"""Files and batches of a click log: each rank is played in turn."""

import itertools
import logging
import math
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shardemb.data.click_log import CriteoLoader, find_criteo, open_click_log
from shardemb.data.clicks import (
    ClickBatch,
)
from shardemb.data.criteo import parse_criteo
from shardemb.data.lines import LineIndex, LineRange
from shardemb.env import Env
from tests.criteo_lines import NUM_EMBEDDINGS, line, numbered

ONE_RANK = Env(rank=0, local_rank=0, world_size=1, num_nodes=1)
REAL = Path(__file__).resolve().parents[2] / "shared/data/criteo-small"


def lines_of(path: Path, text: bytes) -> LineRange:
    path.write_bytes(text)
    index = LineIndex.build([path], env=ONE_RANK, block_bytes=512)
    return LineRange(index=index, first=0, num_lines=index.num_lines)


def loader(
    lines: LineRange, *, rank: int = 0, world_size: int = 1, **options: int | None
) -> CriteoLoader:
    env = Env(rank=rank, local_rank=rank, world_size=world_size, num_nodes=1)
    sizes = {"batch_size": 4} | options
    return CriteoLoader(lines, env=env, num_embeddings_F=NUM_EMBEDDINGS, **sizes)  # type: ignore[arg-type]


def numbers(batch: ClickBatch) -> list[int]:
    return [round(math.expm1(value)) for value in batch.dense_BD[:, 0].double().tolist()]


def all_ranks(
    lines: LineRange, world_size: int, **options: int | None
) -> list[tuple[list[int], list[float]]]:
    """(numbers, weights) of each global batch, put together from what each rank reads."""
    ranks = [
        loader(lines, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]
    return [
        (
            [number for part in parts for number in numbers(part)],
            [weight for part in parts for weight in part.weights_B.tolist()],
        )
        for parts in zip(*ranks, strict=True)
    ]


def touch(folder: Path, **texts: bytes) -> Path:
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_bytes(text)
    return folder


def names(files: Sequence[Path]) -> list[str]:
    return [file.name for file in files]


def test_labelled_valid_and_test_files_are_held_out(tmp_path: Path) -> None:
    folder = touch(
        tmp_path,
        train__txt=line(),
        valid__txt=line(),
        test__tsv=line(),
        test__txt=line()[2:],
        day_0=line(),
    )
    files = find_criteo(folder)
    assert names(files.train) == ["train.txt"]
    assert names(files.held_out) == ["test.tsv", "valid.txt"]


def test_without_a_train_file_all_days_train_in_order(tmp_path: Path) -> None:
    files = find_criteo(
        touch(tmp_path, day_10=line(), day_2=line(), a__tsv=line(), b__csv=b"", c__json=b"")
    )
    assert names(files.train) == ["a.tsv", "day_2", "day_10"]
    assert files.held_out == ()
    assert names(find_criteo(tmp_path / "day_2").train) == ["day_2"]


def test_paths_that_say_too_little_or_too_much_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data path '.*absent' does not exist"):
        find_criteo(tmp_path / "absent")
    with pytest.raises(
        ValueError, match=r"has neither train.txt nor any .* give a folder of Criteo's files"
    ):
        find_criteo(tmp_path)
    with pytest.raises(ValueError, match=r"day_0.gz' is compressed; unpack it first"):
        find_criteo(touch(tmp_path, day_0__gz=b"x"))
    with pytest.raises(ValueError, match=r"has both train.txt and train.tsv"):
        find_criteo(touch(tmp_path, train__txt=line(), train__tsv=line()))


def test_held_out_are_the_files_for_it_or_the_last_tenth(tmp_path: Path) -> None:
    touch(tmp_path, train__txt=numbered(25))
    split = open_click_log(tmp_path, env=ONE_RANK)
    assert (split.train.first, split.train.num_lines) == (0, 23)
    assert (split.held_out.first, split.held_out.num_lines) == (23, 2)
    touch(tmp_path, test__txt=numbered(3))
    split = open_click_log(tmp_path, env=ONE_RANK)
    assert (split.train.num_lines, split.held_out.first, split.held_out.num_lines) == (25, 0, 3)


def test_one_line_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 1 line; give at least 2"):
        open_click_log(touch(tmp_path, train__txt=line()), env=ONE_RANK)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_are_the_same_at_every_world_size(tmp_path: Path, world_size: int) -> None:
    whole = lines_of(tmp_path / "log.txt", numbered(14))
    lines = LineRange(index=whole.index, first=3, num_lines=10)
    batches = all_ranks(lines, world_size, num_steps=6)
    samples = list(itertools.islice(itertools.cycle(range(3, 13)), 24))
    assert batches == [(samples[at : at + 4], [1.0] * 4) for at in range(0, 24, 4)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batch_may_be_longer_than_the_data(tmp_path: Path, world_size: int) -> None:
    lines = lines_of(tmp_path / "log.txt", numbered(3))
    batches = all_ranks(lines, world_size, num_steps=2, batch_size=8)
    assert [batch for batch, _ in batches] == [[0, 1, 2, 0, 1, 2, 0, 1], [2, 0, 1, 2, 0, 1, 2, 0]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_one_pass_is_padded_with_samples_of_weight_0(tmp_path: Path, world_size: int) -> None:
    lines = lines_of(tmp_path / "log.txt", numbered(9))
    batches = all_ranks(lines, world_size, repeat=False)
    assert batches[:2] == [([0, 1, 2, 3], [1.0] * 4), ([4, 5, 6, 7], [1.0] * 4)]
    assert batches[2:] == [([8, 0, 0, 0], [1.0, 0.0, 0.0, 0.0])]
    last = list(loader(lines, rank=world_size - 1, world_size=world_size, repeat=False))[-1]
    assert last.sparse["C1"].lengths().tolist()[1:] == [0] * (4 // world_size - 1)


def test_resumed_loader_goes_on_at_its_step(tmp_path: Path) -> None:
    lines = lines_of(tmp_path / "log.txt", numbered(10))
    whole = all_ranks(lines, 2, num_steps=7)
    assert whole[2] != whole[3]
    assert all_ranks(lines, 2, num_steps=7, start_step=3) == whole[3:]
    assert all_ranks(lines, 2, repeat=False, start_step=2) == [([8, 9, 0, 0], [1.0, 1.0, 0.0, 0.0])]
    assert len(list(loader(lines, repeat=False, num_steps=2))) == 2


def test_loader_begins_again_each_time_it_is_iterated(tmp_path: Path) -> None:
    endless = loader(lines_of(tmp_path / "log.txt", numbered(10)))
    for _ in range(2):
        batches = [numbers(batch) for batch in itertools.islice(endless, 3)]
        assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


def test_malformed_lines_weigh_nothing_and_count_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = numbered(2) + b"spam\n" + numbered(2) + line("x") + numbered(2)
    data = loader(lines_of(tmp_path / "log.txt", text), num_steps=6)
    with caplog.at_level(logging.WARNING, logger="shardemb"):
        batches = list(data)
    assert [batch.weights_B.tolist() for batch in batches[:2]] == [[1, 1, 0, 1], [1, 0, 1, 1]]
    assert numbers(batches[0]) == [0, 1, 0, 0]
    assert batches[0].sparse["C1"].lengths().tolist() == [1, 1, 0, 1]
    assert batches[1].labels_B.tolist() == [1, 0, 0, 1]
    assert data.num_malformed == 2
    assert caplog.messages == [
        f"{tmp_path}/log.txt:3: 1 field instead of 40 (skipped, 1 so far)",
        f"{tmp_path}/log.txt:6: label 'x' is not 0 or 1 (skipped, 2 so far)",
    ]


def test_only_the_first_malformed_lines_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = loader(lines_of(tmp_path / "log.txt", b"spam\n" * 20), repeat=False)
    assert sum(float(batch.weights_B.sum()) for batch in data) == 0
    assert data.num_malformed == 20
    assert len(caplog.messages) == 5


def test_too_many_malformed_lines_end_the_reading_before_their_batch(tmp_path: Path) -> None:
    text = numbered(4) + b"spam\n" + numbered(3) + line("x") * 2 + numbered(2)
    steps = iter(loader(lines_of(tmp_path / "log.txt", text), num_steps=9, max_malformed=2))
    assert numbers(next(steps)) == [0, 1, 2, 3]
    assert next(steps).weights_B.tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"log.txt:10: label 'x' is not 0 or 1; ") as error:
        next(steps)
    assert "this is malformed line 3, and 2 may be skipped; raise --max-malformed" in str(
        error.value
    )
    assert "13 integers and 26 categories of 8 hex digits, separated by tabs" in str(error.value)


def test_as_many_malformed_lines_as_allowed_are_skipped_in_every_epoch(tmp_path: Path) -> None:
    text = b"spam\n" * 3 + numbered(3)
    data = loader(lines_of(tmp_path / "log.txt", text), num_steps=12, max_malformed=3)
    assert sum(float(batch.weights_B.sum()) for batch in data) == 24
    assert data.num_malformed == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 3},
            "batch_size must be a positive multiple of the number of ranks, 2, got 3",
        ),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        (
            {"start_step": -1},
            "start_step, num_steps and max_malformed must not be negative, got -1",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(
    tmp_path: Path, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loader(lines_of(tmp_path / "log.txt", numbered(8)), world_size=2, **options)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak_bytes(count: int) -> int:
        lines = lines_of(tmp_path / "log.txt", line("1", ["7"] * 13, ["0123abcd"] * 26) * count)
        tracemalloc.start()
        assert sum(1 for _ in loader(lines, batch_size=100, repeat=False)) == count // 100
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(500)  # what is allocated once
    small, large = peak_bytes(1_000), peak_bytes(10_000)
    file_bytes = (tmp_path / "log.txt").stat().st_size
    assert large < 1.2 * small
    assert large < file_bytes / 4


@pytest.mark.skipif(not REAL.is_dir(), reason="the sample of Criteo's data is not here")
def test_real_data_is_read_whole() -> None:
    split = open_click_log(REAL, env=ONE_RANK)
    assert (split.train.num_lines, split.held_out.num_lines) == (7_200, 800)
    parsed = [
        parse_criteo(part.index.read(0, part.num_lines)) for part in (split.train, split.held_out)
    ]
    assert all(not rows.malformed and rows.valid_N.all() for rows in parsed)
    labels = np.concatenate([rows.labels_N for rows in parsed])
    missing = np.concatenate(
        [
            np.concatenate([rows.integer_missing_NI, rows.category_missing_NF], axis=1)
            for rows in parsed
        ]
    )
    assert labels[:7_200].mean() == pytest.approx(0.2151, abs=0.0001)
    assert labels.mean() == pytest.approx(0.2160, abs=0.0001)
    assert missing.mean() == pytest.approx(0.146, abs=0.0005)
    data = loader(split.train, batch_size=720, repeat=False)
    assert sum(float(batch.weights_B.sum()) for batch in data) == 7_200
    assert data.num_malformed == 0
