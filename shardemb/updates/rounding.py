"""Stochastic rounding to 16 bits: a pure function of table, row, column and step.

Random bits come from SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014, with the constants of S. Vigna's https://prng.di.unimi.it/splitmix64.c),
which passes BigCrush. A key is the seed of a stream, whose output at a row is the seed of a stream,
whose output at a step is the seed of a stream, of which each output serves four columns with 16
bits each. They are computed in wrapping int64, so that every device, rank and slice of a table
draws the same.
"""

# U rows, D columns of one slice of them, Q fours of columns

import hashlib

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # constants of 64 bits, as int64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_FOUR = 4  # columns that share 64 bits

_MAGNITUDE = 2**31 - 1  # bits of a float32, without its sign
_EXPONENT = 23  # place of its exponent
_FLOAT16_MIN = 127 - 14  # exponent of the smallest normal float16, as float32 writes it
_FLOAT16_BITS = 10  # of the mantissa


def round_stochastically(
    values_UD: Tensor,
    dtype: torch.dtype,
    *,
    key: int,
    rows_U: Tensor,
    first_column: int,
    num_updates: int,
) -> Tensor:
    """Rounds each value to one of its two neighbours, to either with a probability by its distance.

    So the expectation is the value itself, and updates that are too small to be seen alone count on
    average. (Of float16 below 2**-14 it is so to within 2**-16 of the distance of its neighbours.)
    What the dtype holds stays as it is, NaN stays NaN. Beyond the largest finite value there are no
    two neighbours: there it is torch's cast.

    Args:
        values_UD: float32 [U, D].
        dtype: `torch.float16` or `torch.bfloat16`.
        key: Of the table, an integer of 64 bits with or without sign; tables of other keys draw
            other bits.
        rows_U: Row numbers in the whole table, int64 [U].
        first_column: Where in whole rows the D columns begin.
        num_updates: Number of steps of the optimizer, with this one.

    Returns:
        The values, of that dtype [U, D].

    Example:
        >>> values = torch.full((1, 4), 1.0 + 2**-11)  # between 1 and its neighbour in float16
        >>> of_step = {"key": 7, "rows_U": torch.tensor([3]), "num_updates": 1}
        >>> round_stochastically(values, torch.float16, first_column=0, **of_step)[0]
        tensor([1.0000, 1.0010, 1.0000, 1.0000], dtype=torch.float16)
        >>> round_stochastically(values[:, 1:], torch.float16, first_column=1, **of_step)[0]
        tensor([1.0010, 1.0000, 1.0000], dtype=torch.float16)
    """
    signed = (key + 2**63) % 2**64 - 2**63
    seed_U = _drawn(_drawn(signed, rows_U), torch.full_like(rows_U, num_updates))
    random_UD = _random_16(seed_U, first_column, values_UD.shape[1])
    round_to = {torch.float16: _to_float16, torch.bfloat16: _to_bfloat16}[dtype]
    is_between_UD = values_UD.abs() <= torch.finfo(dtype).max  # neither beyond nor NaN
    return torch.where(is_between_UD, round_to(values_UD, random_UD), values_UD.to(dtype))


def _to_bfloat16(values_UD: Tensor, random_UD: Tensor) -> Tensor:
    """Adds 16 random bits below a bfloat16's last bit, then cuts them off; carries are right."""
    bits_UD = (values_UD.view(torch.int32) + random_UD).bitwise_and_(-(2**16))
    return bits_UD.view(torch.float32).to(torch.bfloat16)


def _to_float16(values_UD: Tensor, random_UD: Tensor) -> Tensor:
    """Counts a value in steps of float16 there, exactly; the fraction is the chance to go up."""
    magnitude_UD = values_UD.view(torch.int32) & _MAGNITUDE
    exponent_UD = magnitude_UD.bitwise_right_shift_(_EXPONENT).clamp_(min=_FLOAT16_MIN)
    step_UD = exponent_UD.sub_(_FLOAT16_BITS).bitwise_left_shift_(_EXPONENT).view(torch.float32)
    steps_UD = values_UD.abs().div_(step_UD)
    whole_UD = steps_UD.floor()
    is_up_UD = random_UD < steps_UD.sub_(whole_UD).mul_(2**16)
    return whole_UD.add_(is_up_UD).mul_(step_UD).copysign_(values_UD).to(torch.float16)


def _random_16(seed_U: Tensor, first_column: int, num_columns: int) -> Tensor:
    """16 random bits for each column of each row, int32 [U, D]."""
    first, last = first_column // _FOUR, (first_column + num_columns - 1) // _FOUR
    fours_Q = torch.arange(first, last + 1, device=seed_U.device)
    bits = _drawn(seed_U.unsqueeze(1), fours_Q).view(torch.int16)
    skipped = first_column - first * _FOUR
    return bits[:, skipped : skipped + num_columns].int().bitwise_and_(0xFFFF)


def _drawn(seed: Tensor | int, index: Tensor) -> Tensor:
    """The output of SplitMix64 at an index, from 0, for a seed; int64 for uint64."""
    mixed = seed + _GAMMA * (index + 1)
    mixed = mixed.bitwise_xor_(_shifted(mixed, 30)).mul_(_MIX_1)
    mixed = mixed.bitwise_xor_(_shifted(mixed, 27)).mul_(_MIX_2)
    return mixed.bitwise_xor_(_shifted(mixed, 31))


def _shifted(values: Tensor, places: int) -> Tensor:
    """A shift to the right that brings in zeros."""
    return (values >> places).bitwise_and_((1 << (64 - places)) - 1)


def key_of(table: str) -> int:
    """A number that is a table's own, of 31 bits."""
    return int.from_bytes(hashlib.blake2b(table.encode(), digest_size=4).digest(), "little") >> 1
