"""A torch model that calls embedding modules in every way they can be called."""

# B samples of this rank, L padded length, N ids, D width

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NUM_EMBEDDINGS, PADDING = 41, 3
_LENGTH = 4


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A bag of ids, a weight for each, and as many ids as every sample has."""

    bag: list[int]
    weights: list[float]
    fixed: list[int]
    label: float


def samples_of(step: int, count: int) -> list[Sample]:
    """A global batch: ids that repeat, padding, bags that are empty or hold padding only."""
    generator = torch.Generator().manual_seed(step)

    def ids(number: int) -> list[int]:
        return torch.randint(0, 29, (number,), generator=generator).tolist()

    made = []
    for position in range(count):
        bag = [PADDING, PADDING] if position == 1 else [*ids(position % 4), PADDING][: position % 5]
        weights = torch.rand(len(bag), generator=generator) * 2 - 0.5
        fixed = [*ids(_LENGTH - 1), PADDING if position % 2 else 5]
        label = float(torch.rand((), generator=generator))
        made.append(Sample(bag=bag, weights=weights.tolist(), fixed=fixed, label=label))
    return made


def batch_of(samples: Sequence[Sample], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that the model takes; those of samples come first."""
    lengths = torch.tensor([len(sample.bag) for sample in samples], dtype=torch.int64)
    ends = lengths.cumsum(0)
    return {
        "labels": torch.tensor([sample.label for sample in samples], dtype=dtype),
        "ids": torch.tensor([i for sample in samples for i in sample.bag], dtype=torch.int64),
        "offsets": ends - lengths,
        "offsets_and_last": torch.cat([ends.new_zeros(1), ends]),
        "weights": torch.tensor([w for sample in samples for w in sample.weights], dtype=dtype),
        "fixed": torch.tensor([sample.fixed for sample in samples]).view(len(samples), _LENGTH),
    }


class Lookups(nn.Module):
    """Looks everything up and weighs every output differently; a mean over samples.

    Args:
        width: Of all tables.
    """

    def __init__(self, width: int) -> None:
        super().__init__()

        def bag(**options: Any) -> nn.EmbeddingBag:
            return nn.EmbeddingBag(NUM_EMBEDDINGS, width, **options)

        self.bags = nn.ModuleDict(
            {
                "sum": bag(mode="sum"),
                "mean": bag(include_last_offset=True, padding_idx=PADDING),
                "padded_sum": bag(mode="sum", padding_idx=PADDING - NUM_EMBEDDINGS, sparse=True),
                "fixed_mean": bag(mode="mean"),
                "weighted": bag(mode="sum", padding_idx=PADDING),
                "at_times_weighted": bag(mode="sum", include_last_offset=True),
                "frozen": bag(mode="sum"),
            }
        )
        self.rows = nn.Embedding(NUM_EMBEDDINGS, width, padding_idx=PADDING)
        self.frozen_rows = nn.Embedding(NUM_EMBEDDINGS, width)
        for module in (self.bags["frozen"], self.frozen_rows):
            module.requires_grad_(False)
        with torch.no_grad():  # torch zeroes them at first, which then nobody would notice
            self.rows.weight[PADDING] = 0.5
            for weight in self.bags.parameters():
                weight[PADDING] = 0.25

    def outputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What each lookup returns, [B, D] or [B, L, D]."""
        ids, offsets, bags = batch["ids"], batch["offsets"], self.bags
        fixed, weights, ends = batch["fixed"], batch["weights"], batch["offsets_and_last"]
        return {
            "sum": bags["sum"](ids.int(), offsets.int()),
            "mean": bags["mean"](ids, ends.int()),
            "padded_sum": bags["padded_sum"](fixed),
            "fixed_mean": bags["fixed_mean"](fixed.int()),
            "weighted": bags["weighted"](ids, offsets, per_sample_weights=weights),
            "at_times_weighted": bags["at_times_weighted"](ids, ends),
            "frozen": bags["frozen"](ids, offsets),
            "frozen again": bags["frozen"](fixed),
            "rows": self.rows(fixed),
            "frozen_rows": self.frozen_rows(fixed.int()),
        }

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss."""
        per_sample = []
        for position, out in enumerate(self.outputs(batch).values()):
            ramp_D = torch.linspace(0.5, 1.5, out.shape[-1], dtype=out.dtype) * (1 + position / 8)
            per_sample.append((out * ramp_D).flatten(1).mean(1))
        error_B = torch.stack(per_sample).sum(0) - batch["labels"]
        return error_B.square().mean()
