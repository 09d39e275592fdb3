"""What a step looks up: how many samples, and how many ids of each feature in a sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardemb.data.profile import DataProfile


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The batches that a plan is made for.

    Attributes:
        batch_size: Samples of each rank in a step.
        ids_per_sample: Mean number of ids in a bag of a feature, its pooling factor, by feature;
            for others that of the profile, or 1.
        profile: Measured on a data set: pooling factors, and how ids spread over rows.
    """

    batch_size: int = 512
    ids_per_sample: Mapping[str, float] = field(default_factory=dict)
    profile: DataProfile | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"workload: batch_size must be at least 1, got {self.batch_size}")
        for feature, number in self.ids_per_sample.items():
            if not 0 <= number < float("inf"):
                raise ValueError(
                    f"workload: ids_per_sample of feature {feature!r} must be a number from 0, "
                    f"got {number}"
                )

    def ids_of(self, feature: str) -> float:
        """Mean number of ids of a feature in a sample."""
        if feature in self.ids_per_sample:
            return self.ids_per_sample[feature]
        if self.profile is not None and feature in self.profile.features:
            return self.profile.features[feature].ids_per_sample
        return 1.0
