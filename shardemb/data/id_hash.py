"""Hashes of ids that are the same in every process, on every machine and in every version."""

# N ids

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt


def mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The first output of SplitMix64 for each seed: a bijection of 64 bits that looks random.

    S. Vigna's https://prng.di.unimi.it/splitmix64.c, after Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014:

        z = seed + 0x9e3779b97f4a7c15
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb
        z ^ (z >> 31)

    Args:
        values: The seeds, uint64 of any shape.

    Returns:
        uint64 of the same shape.

    Example:
        >>> f"{mix64(np.zeros(1, dtype=np.uint64))[0]:x}"
        'e220a8397b1dcdaf'
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hash_ids(ids_N: npt.NDArray[np.int64], num_embeddings: int) -> npt.NDArray[np.int64]:
    """Spreads ids evenly over the rows of a table: `mix64` of the id's 64 bits, modulo the rows.

    No feature, table or seed goes into it: an id has the same row wherever num_embeddings is the
    same, in training, in serving and in any other program that computes the formula.

    Args:
        ids_N: Any int64 [N], negative ones too, which are taken as their two's complement.
        num_embeddings: Rows of the table.

    Returns:
        int64 [N], each in [0, num_embeddings).

    Example:
        >>> hash_ids(np.array([0, -1, 2**62]), 1000)
        array([535, 936,  75])
    """
    mixed_N = mix64(np.ascontiguousarray(ids_N, dtype=np.int64).view(np.uint64))
    return (mixed_N % np.uint64(num_embeddings)).astype(np.int64)


def ids_of_strings(texts: Iterable[str]) -> npt.NDArray[np.int64]:
    """An id for each string: BLAKE2b (RFC 7693) with a digest of 8 bytes of its UTF-8, unkeyed.

    The 8 bytes are read as a little-endian int64. Among n distinct strings some two share an id
    with a probability of about n**2 / 2**65.

    Args:
        texts: N strings.

    Returns:
        int64 [N].

    Example:
        >>> ids_of_strings(["tea", "", "tea"])
        array([-8015135494872013382, -5426141060434712860, -8015135494872013382])
    """
    texts = list(texts)
    digest_of = {
        text: blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for text in set(texts)
    }
    ids_N = np.frombuffer(b"".join(map(digest_of.__getitem__, texts)), dtype="<i8")
    return ids_N.astype(np.int64)
