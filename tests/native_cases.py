"""Blocks and bags for tests of the compiled kernels, and what plain torch in float64 makes of them.

All numbers are small multiples of powers of two, so that sums are exact in any order.
"""

# R rows of a block, B bags of a feature, F features, N ids, D width

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shardemb.native import library as compiled
from shardemb.native.kernels import Bags, Block, Blocks, Merged

needs_kernels = pytest.mark.skipif(
    compiled.library() is None, reason=str(compiled.missing() or "there are kernels")
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 3, 16, 20, 64, 100, 130, 256)
THREADS = (1, 2, 3, 5)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """The kernels work with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def levels() -> list[int]:
    """The levels that were built and that this machine can run."""
    lowest = compiled._load(1)
    assert lowest is not None
    best = lowest.se_level()
    return [level for level in (1, 3, 4) if level <= best and compiled._load(level) is not None]


def blocks_of(
    weights: Sequence[Tensor], features: Sequence[int], *, level: int | None = None
) -> Blocks:
    """Kernels on blocks that follow one another.

    Args:
        weights: Their rows [R, D].
        features: How many features each has.
        level: Of the code that runs; by default the best.
    """
    found, feature, column = [], 0, 0
    for weight_RD, number in zip(weights, features, strict=True):
        found.append(
            Block(
                weight_RD=weight_RD,
                first_feature=feature,
                num_features=number,
                first_column=column,
            )
        )
        feature += number
        column += number * weight_RD.shape[1]
    blocks = Blocks(found)
    if level is not None:
        loaded = compiled._load(level)
        assert loaded is not None
        blocks._c = loaded
    return blocks


def dyadic(*shape: int, steps: int = 64, generator: torch.Generator) -> Tensor:
    """Multiples of 1 / steps between -1 and 1, float32."""
    return torch.randint(-steps, steps + 1, shape, generator=generator) / steps


@dataclass(frozen=True, kw_only=True)
class Case:
    """A lookup.

    Attributes:
        weights: Rows of each block [R, D].
        features: How many features each block has.
        bags: Of all features.
        grad: Of the output.
    """

    weights: list[Tensor]
    features: tuple[int, ...]
    bags: Bags
    grad: Tensor

    def blocks(self, level: int | None = None) -> Blocks:
        """The kernels on copies of nothing: they write to `weights`."""
        return blocks_of(self.weights, self.features, level=level)

    def merged(self, level: int | None = None) -> Merged:
        """The ids of this one lookup, sorted."""
        merged = Merged(self.blocks(level))
        merged.sort([(self.bags, self.grad)])
        return merged

    def copied(self) -> "Case":
        """The same with rows of its own."""
        return replace(self, weights=[weight.clone() for weight in self.weights])

    def reference(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """What plain torch looks up; by autograd, gradients of rows and of the ids' weights.

        Returns:
            Float64 [B, columns] or [N, D]; [R, D] of each block; [N].
        """
        weights = [weight.double().requires_grad_() for weight in self.weights]
        weights_N = torch.ones(len(self.bags.ids_N), dtype=torch.float64)
        if self.bags.weights_N is not None:
            weights_N = self.bags.weights_N.double()
        weights_N.requires_grad_()
        of_features = [
            weight
            for weight, number in zip(weights, self.features, strict=True)
            for _ in range(number)
        ]
        ends = self.bags.offsets.long()[:: self.bags.num_bags or 1]
        parts = []
        for feature, weight in enumerate(of_features):
            first, last = (ends[feature], ends[feature + 1]) if self.bags.num_bags else (0, 0)
            ids = self.bags.ids_N[first:last].long()
            if self.bags.pooling is None:
                parts.append(functional.embedding(ids, weight))
                continue
            of_bags = self.bags.offsets[feature * self.bags.num_bags :][: self.bags.num_bags + 1]
            rows = functional.embedding(ids, weight) * weights_N[first:last, None]
            bag_of_id = torch.repeat_interleave(of_bags.diff())
            pooled = rows.new_zeros(self.bags.num_bags, weight.shape[1])
            pooled = pooled.index_add(0, bag_of_id, rows)
            if self.bags.pooling == "mean":
                pooled = pooled / of_bags.diff().clamp(min=1)[:, None]
            parts.append(pooled)
        output = torch.cat(parts, 0 if self.bags.pooling is None else 1)
        output.backward(self.grad.double())
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        grad_N = torch.zeros_like(weights_N) if weights_N.grad is None else weights_N.grad
        return output.detach(), grads, grad_N


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What `make_case` makes; two blocks, of which the first serves two features.

    Attributes:
        widths: Of the blocks.
        dtype: Of their rows.
        num_rows: Of each block.
        num_bags: Of each feature.
        longest: Bags have from 0 to so many ids.
        pooling: As `Bags` has it.
        weighted: Whether ids have weights.
        id_dtype: Of ids.
        offset_dtype: Of offsets.
        hot: Share of the ids that are of row 1.
        seed: Of all numbers.
    """

    widths: tuple[int, int] = (20, 20)
    dtype: torch.dtype = torch.float32
    num_rows: int = 40
    num_bags: int = 50
    longest: int = 5
    pooling: str | None = "sum"
    weighted: bool = False
    id_dtype: torch.dtype = torch.int64
    offset_dtype: torch.dtype = torch.int64
    hot: float = 0.0
    seed: int = 0


FEATURES = (2, 1)


def make_case(shape: Shape) -> Case:
    """A lookup of that shape, of which all sums are exact."""
    generator = torch.Generator().manual_seed(shape.seed)
    num_features = sum(FEATURES)
    lengths = torch.randint(
        0, shape.longest + 1, (num_features * shape.num_bags,), generator=generator
    )
    offsets = functional.pad(lengths.cumsum(0), (1, 0)).to(shape.offset_dtype)
    num_ids = int(offsets[-1])
    ids_N = torch.randint(0, shape.num_rows, (num_ids,), generator=generator)
    ids_N[torch.rand(num_ids, generator=generator) < shape.hot] = min(1, shape.num_rows - 1)
    weights_N = dyadic(num_ids, steps=8, generator=generator) if shape.weighted else None
    bags = Bags(
        ids_N=ids_N.to(shape.id_dtype),
        offsets=offsets,
        weights_N=weights_N,
        num_features=num_features,
        pooling=shape.pooling,
    )
    weights = [
        dyadic(shape.num_rows, width, generator=generator).to(shape.dtype) for width in shape.widths
    ]
    columns = sum(width * n for width, n in zip(shape.widths, FEATURES, strict=True))
    size = (num_ids, shape.widths[0]) if shape.pooling is None else (shape.num_bags, columns)
    return Case(
        weights=weights,
        features=FEATURES,
        bags=bags,
        grad=dyadic(*size, steps=16, generator=generator),
    )
