"""A generated click log in Criteo's format, whose best possible AUC is known. Trains nothing.

Cells are independent draws. The label's logit is a planted function of the cells: an effect of each
id and of each integer, and products of the effects of pairs of fields.
"""

# N rows, I = 13 integers, F = 26 categories, V ids of a field

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shardemb.data.clicks import CATEGORY_NAMES

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Mask = npt.NDArray[np.bool_]
_Text = npt.NDArray[np.uint8]

# What follows is the definition of the log; another number is another log, so _VERSION changes too.
_VERSION = 1
_CHUNK_ROWS = 8192
_DRAWS = 13 + 13 + 26 + 26 + 1  # of a row: counts, which are missing, ids, which are missing, label
_BIAS = -1.47
_VOCABULARY_F = np.array(
    [
        [1_500, 600, 20_000, 12_000, 300, 20, 8_000, 500, 3, 15_000, 5_000, 20_000, 3_000],
        [27, 6_000, 15_000, 10, 4_000, 2_000, 4, 18_000, 18, 15, 10_000, 100, 7_000],
    ]
).ravel()
_ZIPF_F = 1.1 + 0.02 * (np.arange(26) % 11)
_MISSING_CATEGORY = 0.03
_MISSING_INTEGER = 0.10
_COUNT_SCALE_I = np.array([2.0, 8, 6, 5, 900, 40, 6, 9, 50, 1, 2, 1, 6])
_OFFSET_I = np.array([0, -1] + [0] * 11)  # I2 begins at -1, as in Criteo's log
_MAX_COUNT = 999_999
_ID_STD, _INTEGER_STD, _PAIR_STD = 1.2, 0.6, 0.5  # of the logit, each part in all
_HEAD = 20  # an id's effect shrinks with its rank beyond this one: nobody can learn the tail's
_PAIRS = ((5, 16), (13, 16), (21, 16))  # small fields, whose combinations a log shows often
_IDS, _SLOPES, _SIGNS = 2, 3, 4  # streams of random numbers; 0 and 1 are the files'


@dataclass(frozen=True, kw_only=True)
class GeneratedLog:
    """A generated click log on disk.

    Attributes:
        folder: Where it is: train.txt, test.txt and generated.json.
        num_train: Rows of train.txt.
        num_test: Rows of test.txt.
        seed: What it was generated from.
        best_auc: The AUC on test.txt to expect of a model that knows the planted function.
    """

    folder: Path
    num_train: int
    num_test: int
    seed: int
    best_auc: float


def write_click_log(folder: Path, *, num_train: int, num_test: int, seed: int = 0) -> GeneratedLog:
    """Writes a click log, the same bytes for the same arguments. Call it on one rank only.

    The files get their names when they are whole, generated.json the last.

    Args:
        folder: Where to; made if need be. A log that was generated there before is replaced.
        num_train: Rows of train.txt.
        num_test: Rows of test.txt.
        seed: Which log, from 0 to 2**63 - 1.

    Returns:
        What was written.

    Raises:
        ValueError: A number is out of range, or the folder holds a log that was not generated.
    """
    if num_train < 1 or num_test < 2 or not 0 <= seed < 1 << 63:
        raise ValueError(
            "num_train must be at least 1, num_test at least 2 and seed in 0..2**63-1, got "
            f"num_train={num_train}, num_test={num_test}, seed={seed}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    train, test, facts = (folder / name for name in ("train.txt", "test.txt", "generated.json"))
    partials = {_partial(file) for file in (train, test, facts)}
    foreign = [file for file in folder.iterdir() if file not in partials]
    if foreign and not facts.exists() and not _partial(facts).exists():
        raise ValueError(
            f"folder '{folder}' holds {foreign[0].name} and no generated.json, so it is not that "
            "of a generated log; give a new or empty folder"
        )
    model = _PlantedModel(seed)
    _write(_partial(train), model.chunks(num_train, part=0))
    probabilities = _write(_partial(test), model.chunks(num_test, part=1), keep=True)
    log = GeneratedLog(
        folder=folder,
        num_train=num_train,
        num_test=num_test,
        seed=seed,
        best_auc=round(expected_auc(probabilities), 6),
    )
    num_ids = dict(zip(CATEGORY_NAMES, _VOCABULARY_F.tolist(), strict=True))
    about = {**asdict(log), "version": _VERSION, "num_ids": num_ids}
    del about["folder"]
    _partial(facts).write_text(json.dumps(about, indent=2) + "\n")
    facts.unlink(missing_ok=True)
    for file in (train, test, facts):
        os.replace(_partial(file), file)
    return log


def read_generated(folder: Path) -> GeneratedLog:
    """Reads what generated.json says of a log.

    Args:
        folder: Where the log is.

    Returns:
        The log that `write_click_log` returned.

    Raises:
        ValueError: The folder holds no whole generated log.
    """
    file = folder / "generated.json"
    try:
        about = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(
            f"folder '{folder}' holds no generated log: {file.name}: {error.strerror}; write one "
            "with write_click_log"
        ) from error
    keys = ("num_train", "num_test", "seed", "best_auc")
    if about.get("version") != _VERSION or not set(keys) <= set(about):
        raise ValueError(
            f"folder '{folder}' holds a generated log of another version of shardemb; remove it"
        )
    return GeneratedLog(folder=folder, **{key: about[key] for key in keys})


def expected_auc(probabilities_N: _Floats) -> float:
    """The AUC to expect of ranking rows by their true probabilities, which no ranking exceeds.

    With labels drawn from the p, a pair of rows i != j has i positive and j negative with
    probability p_i (1 - p_j), and is ranked right if p_i > p_j, half right if they are equal:

        sum over i != j of p_i (1 - p_j) ([p_i > p_j] + [p_i = p_j] / 2)  /  sum of p_i (1 - p_j)

    It is a ratio of expectations; the expectation of the ratio differs by O(1 / N). Its cost is
    O(N log N).

    Args:
        probabilities_N: float64 [N], each row's probability of a click.

    Returns:
        The AUC.

    Raises:
        ValueError: No two rows can have different labels.

    Example:
        >>> expected_auc(np.array([0.0, 0.5, 1.0]))
        1.0
    """
    values, counts = np.unique(probabilities_N, return_counts=True)
    positives, negatives = counts * values, counts * (1 - values)
    same_row = counts * values * (1 - values)
    negatives_below = np.cumsum(negatives) - negatives
    right = positives @ negatives_below + (positives @ negatives - same_row.sum()) / 2
    pairs = positives.sum() * negatives.sum() - same_row.sum()
    if pairs <= 0:
        raise ValueError(
            f"the AUC of {len(probabilities_N)} rows is undefined: none can be positive while "
            "another is negative; give more rows"
        )
    return float(right / pairs)


def _partial(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def _write(file: Path, chunks: Iterator[tuple[bytes, _Floats]], *, keep: bool = False) -> _Floats:
    kept = [np.empty(0)]
    with open(file, "wb") as stream:
        for text, probabilities_N in chunks:
            stream.write(text)
            if keep:
                kept.append(probabilities_N)
        stream.flush()
        os.fsync(stream.fileno())
    return np.concatenate(kept)


class _PlantedModel:
    """The distribution of the cells, and the logit as a function of them. Id V means missing."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        fields = range(len(CATEGORY_NAMES))
        self._cdfs = [_zipf_cdf(_VOCABULARY_F[field], _ZIPF_F[field]) for field in fields]
        self._tokens = [_tokens(field, _VOCABULARY_F[field]) for field in fields]
        stds_F = _VOCABULARY_F**-0.2  # small fields say more
        stds_F *= _ID_STD / np.sqrt(np.square(stds_F).sum())
        self._stds_F = stds_F
        self._effects = [self._standard_effects(field) for field in fields]
        quantiles = np.repeat((np.arange(4096) + 0.5)[:, None] / 4096, 13, axis=1)
        logs = np.log1p(_counts(quantiles))
        self._log_mean_I, self._log_std_I = logs.mean(axis=0), logs.std(axis=0)
        slopes_I = 0.4 + self._uniforms(_SLOPES, 0, 13)
        slopes_I *= np.where(self._uniforms(_SIGNS, 0, 13) < 0.7, 1, -1)
        self._slopes_I = slopes_I * _INTEGER_STD / np.sqrt(np.square(slopes_I).sum())

    def chunks(self, num_rows: int, *, part: int) -> Iterator[tuple[bytes, _Floats]]:
        """Yields each chunk's text and probabilities, a pure function of seed, part and chunk."""
        for first in range(0, num_rows, _CHUNK_ROWS):
            size = min(_CHUNK_ROWS, num_rows - first)
            uniforms = self._uniforms(part, first // _CHUNK_ROWS, _CHUNK_ROWS * _DRAWS)
            uniforms = uniforms.reshape(_CHUNK_ROWS, _DRAWS)[:size]
            counts_NI = _counts(uniforms[:, :13])
            missing_NI = uniforms[:, 13:26] < _MISSING_INTEGER
            ids_NF = np.empty((size, 26), dtype=np.int64)
            for field, cdf in enumerate(self._cdfs):
                ids_NF[:, field] = np.searchsorted(cdf, uniforms[:, 26 + field], side="right")
            ids_NF = np.where(uniforms[:, 52:78] < _MISSING_CATEGORY, _VOCABULARY_F, ids_NF)
            probabilities_N = 1 / (1 + np.exp(-self._logits(counts_NI, missing_NI, ids_NF)))
            labels_N = uniforms[:, 78] < probabilities_N
            yield self._text(labels_N, counts_NI, missing_NI, ids_NF), probabilities_N

    def _uniforms(self, stream: int, number: int, size: int) -> _Floats:
        """float64 [size] in [0, 1), from bits that NumPy promises never to change."""
        key = np.array([self._seed, stream << 56 | number], dtype=np.uint64)
        bits: npt.NDArray[np.uint64] = np.random.Philox(key=key).random_raw(size)
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _standard_effects(self, field: int) -> _Floats:
        """float64 [V + 1], a value of each id of mean 0 and variance 1 over rows; 0 if missing."""
        num_ids = int(_VOCABULARY_F[field])
        values_V = self._uniforms(_IDS, field, num_ids * 4).reshape(-1, 4).sum(axis=1) - 2
        values_V *= np.minimum(1, _HEAD / (1 + np.arange(num_ids)))
        share_V = np.diff(self._cdfs[field], prepend=0)
        values_V -= share_V @ values_V
        return np.append(values_V / np.sqrt(share_V @ np.square(values_V)), 0)

    def _logits(self, counts_NI: _Ints, missing_NI: _Mask, ids_NF: _Ints) -> _Floats:
        scaled_NI = (np.log1p(counts_NI) - self._log_mean_I) / self._log_std_I
        effects_NF = np.stack(
            [effects_V[ids_NF[:, field]] for field, effects_V in enumerate(self._effects)], axis=1
        )
        # Sums, not BLAS products, whose rounding depends on the machine and may tip a label.
        logits_N: _Floats = _BIAS + (effects_NF * self._stds_F).sum(axis=1)
        logits_N += (np.where(missing_NI, 0, scaled_NI) * self._slopes_I).sum(axis=1)
        for left, right in _PAIRS:
            products_N = effects_NF[:, left] * effects_NF[:, right]
            logits_N += _PAIR_STD / np.sqrt(len(_PAIRS)) * products_N
        return logits_N

    def _text(self, labels_N: _Mask, counts_NI: _Ints, missing_NI: _Mask, ids_NF: _Ints) -> bytes:
        """The rows as a matrix of characters, 0 where a cell is shorter than its column."""
        no_label_N = np.zeros(len(labels_N), dtype=np.bool_)
        values_NI = counts_NI + _OFFSET_I
        columns = [_decimal(labels_N.astype(np.int64), no_label_N)]
        columns += [_decimal(*cells) for cells in zip(values_NI.T, missing_NI.T, strict=True)]
        columns += [tokens[ids_NF[:, field]] for field, tokens in enumerate(self._tokens)]
        text: _Text = np.concatenate(columns, axis=1)
        text[:, -1] = ord("\n")
        return bytes(text[text != 0])


def _zipf_cdf(num_ids: int, exponent: float) -> _Floats:
    cdf = np.cumsum(np.arange(1, num_ids + 1) ** -exponent)
    cdf /= cdf[-1]
    return cdf


def _counts(uniforms_NI: _Floats) -> _Ints:
    """Heavy-tailed counts, P(count >= x) = scale / (scale + x), the same on any machine."""
    counts_NI = _COUNT_SCALE_I * uniforms_NI / (1 - uniforms_NI)
    return np.minimum(counts_NI, _MAX_COUNT).astype(np.int64)


def _tokens(field: int, num_ids: int) -> _Text:
    """uint8 [V + 1, 9], eight hex digits and a tab for each id; a tab alone for the missing one.

    The digits are MurmurHash3's 32-bit finalizer (https://github.com/aappleby/smhasher), a
    bijection, of 5 bits of field and 27 of id: no two ids of any fields share them.
    """
    mixed_V = (np.uint32(field) << np.uint32(27)) | np.arange(num_ids, dtype=np.uint32)
    mixed_V ^= mixed_V >> np.uint32(16)
    mixed_V *= np.uint32(0x85EBCA6B)
    mixed_V ^= mixed_V >> np.uint32(13)
    mixed_V *= np.uint32(0xC2B2AE35)
    mixed_V ^= mixed_V >> np.uint32(16)
    nibbles = (mixed_V[:, None] >> np.arange(28, -1, -4, dtype=np.uint32)) & np.uint32(15)
    tokens = np.zeros((num_ids + 1, 9), dtype=np.uint8)
    tokens[:-1, :8] = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)[nibbles]
    tokens[:, 8] = ord("\t")
    return tokens


def _decimal(values_N: _Ints, missing_N: _Mask) -> _Text:
    """uint8 [N, 8], a sign, up to six digits and a tab, with 0 for what is not there."""
    text = np.zeros((len(values_N), 8), dtype=np.uint8)
    text[:, 0] = np.where(values_N < 0, ord("-"), 0)
    rest_N = np.abs(values_N)
    for column in range(6, 0, -1):
        shown = (rest_N > 0) | (column == 6)
        text[:, column] = np.where(shown, ord("0") + rest_N % 10, 0)
        rest_N = rest_N // 10
    text[missing_N] = 0
    text[:, 7] = ord("\t")
    return text
