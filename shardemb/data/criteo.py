"""The format of the Criteo challenge's click log. Opens no file.

A line is a label (0 or 1), 13 integers and 26 categories of eight hex digits, separated by tabs. An
empty cell is missing.
"""

# N rows, G rows of 40 fields, I = 13 integers, F = 26 categories

import re
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from shardemb.data.clicks import CATEGORY_NAMES, INTEGER_NAMES, CriteoRows

FORMAT = "a label (0 or 1), 13 integers and 26 categories of 8 hex digits, separated by tabs"
NUM_FIELDS = 1 + len(INTEGER_NAMES) + len(CATEGORY_NAMES)
_NUM_INTEGERS = len(INTEGER_NAMES)
_MAX_DIGITS = 18  # what int64 holds of any digits
_TAB, _NEWLINE, _RETURN, _MINUS, _ZERO = (ord(character) for character in "\t\n\r-0")
_NOT_HEX = 0x80
_HEX_VALUE = np.full(256, _NOT_HEX, dtype=np.uint8)
for _value, _digit in enumerate("0123456789abcdef"):
    _HEX_VALUE[[ord(_digit), ord(_digit.upper())]] = _value

_Bytes = npt.NDArray[np.uint8]
_Positions = npt.NDArray[np.int64]
_Mask = npt.NDArray[np.bool_]


def parse_criteo(block: bytes) -> CriteoRows:
    r"""Parses whole lines. A malformed line is a row all the same, of which nothing is used.

    Args:
        block: Lines that end in "\n" or "\r\n".

    Returns:
        One row for each line, N in all; `malformed` says what is wrong with which.

    Example:
        >>> rows = parse_criteo(b"1\t7" + b"\t" * 12 + b"\t68fd1e64" + b"\t" * 25 + b"\nspam\n")
        >>> rows.labels_N, rows.valid_N, rows.malformed
        (array([1., 0.], dtype=float32), array([ True, False]), ((1, '1 field instead of 40'),))
    """
    if block and not block.endswith(b"\n"):
        block += b"\n"
    text = np.frombuffer(block, dtype=np.uint8)
    separators = np.flatnonzero((text == _TAB) | (text == _NEWLINE))
    last_of_row_N = np.flatnonzero(text[separators] == _NEWLINE)
    num_fields_N = np.diff(last_of_row_N, prepend=-1)
    rows = CriteoRows.blank(len(num_fields_N))
    of_40_N = num_fields_N == NUM_FIELDS
    malformed = [
        (int(row), f"{num_fields_N[row]} field{'s' * bool(num_fields_N[row] > 1)} instead of 40")
        for row in np.flatnonzero(~of_40_N)
    ]
    if of_40_N.any():
        malformed += _fill(rows, block, text, separators[np.repeat(of_40_N, num_fields_N)], of_40_N)
    return replace(rows, malformed=tuple(sorted(malformed)))


def _fill(
    rows: CriteoRows, block: bytes, text: _Bytes, separators: _Positions, of_40_N: _Mask
) -> list[tuple[int, str]]:
    """Writes the rows of 40 fields into `rows`; returns the malformed of them, and why."""
    ends = separators.reshape(-1, NUM_FIELDS)
    starts = np.empty_like(ends)
    starts[:, 1:] = ends[:, :-1] + 1
    newlines_N = np.flatnonzero(text == _NEWLINE)
    starts[:, 0] = np.concatenate([[0], newlines_N[:-1] + 1])[of_40_N]
    has_return_G = (ends[:, -1] > starts[:, -1]) & (text[ends[:, -1] - 1] == _RETURN)
    ends[:, -1] -= has_return_G
    labels_G, label_bad_G = _labels(text, starts[:, 0], ends[:, 0])
    integers, categories = np.s_[:, 1 : 1 + _NUM_INTEGERS], np.s_[:, 1 + _NUM_INTEGERS :]
    integers_GI, integer_bad_GI = _integers(text, starts[integers], ends[integers])
    categories_GF, category_bad_GF = _categories(text, starts[categories], ends[categories])
    bad = np.concatenate([label_bad_G[:, None], integer_bad_GI, category_bad_GF], axis=1)
    good_G = ~bad.any(axis=1)
    row_G = np.flatnonzero(of_40_N)
    missing = starts == ends
    good_rows = row_G[good_G]
    rows.labels_N[good_rows] = labels_G[good_G]
    rows.integers_NI[good_rows] = integers_GI[good_G]
    rows.integer_missing_NI[good_rows] = missing[integers][good_G]
    rows.categories_NF[good_rows] = categories_GF[good_G]
    rows.category_missing_NF[good_rows] = missing[categories][good_G]
    rows.valid_N[good_rows] = True
    first_bad = bad.argmax(axis=1)
    return [
        (int(row_G[at]), _reason(field, block[starts[at, field] : ends[at, field]]))
        for at in np.flatnonzero(~good_G)
        for field in [int(first_bad[at])]
    ]


def _reason(field: int, cell: bytes) -> str:
    shown = repr(cell[:40].decode(errors="replace")) + "..." * (len(cell) > 40)
    if field == 0:
        return f"label {shown} is not 0 or 1"
    if field > _NUM_INTEGERS:
        return f"category {field - _NUM_INTEGERS} is {shown}"
    too_long = re.fullmatch(rb"-?\d+", cell) is not None
    return f"integer {field} is {shown}" + f", over {_MAX_DIGITS} digits" * too_long


def _labels(text: _Bytes, starts: _Positions, ends: _Positions) -> tuple[_Bytes, _Mask]:
    labels_G = text[starts] - np.uint8(_ZERO)  # any other character wraps to more than 1
    return labels_G, (ends - starts != 1) | (labels_G > 1)


def _integers(
    text: _Bytes, starts: _Positions, ends: _Positions
) -> tuple[npt.NDArray[np.float32], _Mask]:
    is_negative = text[starts] == _MINUS
    firsts, num_digits = (starts + is_negative).ravel(), (ends - starts - is_negative).ravel()
    bad = (is_negative.ravel() & (num_digits == 0)) | (num_digits > _MAX_DIGITS)
    values = np.zeros(len(firsts), dtype=np.int64)
    cells = np.flatnonzero(~bad & (num_digits > 0))
    for position in range(_MAX_DIGITS):
        if not len(cells):
            break
        digits = text[firsts[cells] + position] - np.uint8(_ZERO)  # wraps likewise
        bad[cells] |= digits > 9
        values[cells] = values[cells] * 10 + digits
        cells = cells[num_digits[cells] > position + 1]
    values[bad] = 0
    logs = np.log1p(values.astype(np.float64)).reshape(starts.shape)
    return np.where(is_negative, -logs, logs).astype(np.float32), bad.reshape(starts.shape)


def _categories(
    text: _Bytes, starts: _Positions, ends: _Positions
) -> tuple[npt.NDArray[np.uint32], _Mask]:
    num_digits = (ends - starts).ravel()
    cells = np.flatnonzero(num_digits == 8)
    firsts = starts.ravel()[cells]
    values, seen = np.zeros(len(cells), dtype=np.uint32), np.zeros(len(cells), dtype=np.uint8)
    for position in range(8):
        digits = _HEX_VALUE[text[firsts + position]]
        seen |= digits
        values = (values << np.uint32(4)) | digits
    bad = (num_digits != 8) & (num_digits != 0)
    bad[cells] = seen >= _NOT_HEX
    categories = np.zeros(len(num_digits), dtype=np.uint32)
    categories[cells] = values
    return categories.reshape(starts.shape), bad.reshape(starts.shape)
