"""What a step looks up: how many samples, and how many ids of each feature in a sample."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from types import NoneType

from shardemb.data.profile import DataProfile, FeatureProfile

_MOST_SAMPLES = 2**31 - 1
_MOST_IDS = 1e9


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The batches that a plan is made for.

    Attributes:
        batch_size: Samples of each rank in a step.
        ids_per_sample: Mean number of ids in a bag of a feature, its pooling factor, by feature;
            for others that of the profile, or 1.
        profile: Measured on a data set: pooling factors, and how ids spread over rows. It may know
            more features than the tables do.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> Workload(ids_per_sample={"clicked": 2.5}).ids_of("clicked")
        2.5
    """

    batch_size: int = 512
    ids_per_sample: Mapping[str, float] = field(default_factory=dict)
    profile: DataProfile | None = None

    def __post_init__(self) -> None:
        size = self.batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"workload: batch_size must be a positive integer, got {size!r}")
        if size > _MOST_SAMPLES:
            raise ValueError(
                f"workload: batch_size must be at most {_MOST_SAMPLES}, got {reprlib.repr(size)}"
            )
        if not isinstance(self.ids_per_sample, Mapping):
            raise ValueError(
                "workload: ids_per_sample must be numbers by feature, such as "
                f"{{'clicked': 2.5}}, got {self.ids_per_sample!r}"
            )
        for feature, number in self.ids_per_sample.items():
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not is_number or not 0 <= number <= _MOST_IDS:
                raise ValueError(
                    f"workload: ids_per_sample of feature {feature!r} must be a number from 0, "
                    f"got {reprlib.repr(number)}; the most is {_MOST_IDS:g}"
                )
        is_path = isinstance(self.profile, (str, PathLike))
        way = f"; use shardemb.load_profile({str(self.profile)!r})" if is_path else ""
        if not isinstance(self.profile, (DataProfile, NoneType)):
            raise ValueError(
                "workload: profile must be a DataProfile, such as load_profile returns, got "
                f"{self.profile!r}{way}"
            )

    def ids_of(self, feature: str) -> float:
        """Mean number of ids of a feature in a sample."""
        if feature in self.ids_per_sample:
            return self.ids_per_sample[feature]
        if self.profile is not None and feature in self.profile.features:
            return self.profile.features[feature].ids_per_sample
        return 1.0

    def profile_of(self, feature: str, *, table: str, num_embeddings: int) -> FeatureProfile | None:
        """How the ids of a feature spread over the rows of a table.

        Args:
            feature: The feature.
            table: The table that it looks up.
            num_embeddings: Rows of the table.

        Returns:
            What was measured; None if nothing was.

        Raises:
            ValueError: The profile has ids that the table does not have.
        """
        found = None if self.profile is None else self.profile.features.get(feature)
        if found is None or not found.num_ids:
            return None
        if found.ids_before([num_embeddings])[0] < found.num_ids:
            raise ValueError(
                f"the profile has ids of feature {feature!r} that table {table!r} does not have, "
                f"of {num_embeddings} rows; it was counted for {found.num_embeddings}: profile the "
                f"data again with num_embeddings={num_embeddings}, or leave the feature out of the "
                "profile"
            )
        return found
