"""Writes and reads a `DataProfile` as a JSON file, and prints it. Counts nothing."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from shardemb.data.profile import DataProfile, FeatureProfile
from shardemb.text import format_table

_FORMAT = 1
_FIELDS = {field.name for field in fields(FeatureProfile)}


def save_profile(profile: DataProfile, path: str | Path) -> None:
    """Writes a profile, a feature a line; a file that is there is replaced in one move.

    Args:
        profile: What to write.
        path: The file.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(path)
    features = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(asdict(feature))}"
        for name, feature in profile.features.items()
    )
    text = (
        f'{{"format": {_FORMAT}, "source": {json.dumps(profile.source)}, "features": {{\n'
        f"{features}\n}}}}\n"
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def load_profile(path: str | Path) -> DataProfile:
    """Reads a profile.

    Args:
        path: A file of `save_profile` or of `shardemb data profile`.

    Returns:
        The profile that was written.

    Raises:
        ValueError: The file is damaged, holds something else, or is of another version.
        OSError: It cannot be read.

    Example:
        >>> import tempfile
        >>> t = FeatureProfile(
        ...     num_embeddings=2, num_samples=4, num_ids=3, num_rows_touched=1,
        ...     block_rows=1, block_counts=(0, 3),
        ... )
        >>> file = Path(tempfile.mkdtemp()) / "profile.json"
        >>> save_profile(DataProfile(source="four samples", features={"x": t}), file)
        >>> load_profile(file).features["x"] == t
        True
    """
    path = Path(path)
    try:
        return _profile_of(json.loads(path.read_bytes()))
    except ValueError as error:  # also of JSON and of UTF-8
        raise ValueError(
            f"profile {path} cannot be used: {error}; make it again with shardemb data profile"
        ) from error


def describe_profile(profile: DataProfile) -> str:
    """A profile as a table to read.

    Args:
        profile: The profile.

    Returns:
        A line for each feature, without a trailing newline.
    """
    rows = [
        (
            name,
            f"{feature.num_samples:,}",
            f"{feature.ids_per_sample:.2f}",
            f"{feature.num_rows_touched:,} of {feature.num_embeddings:,}",
            f"{feature.num_rows_touched / feature.num_embeddings:.1%}",
            f"{feature.hottest_row_share:.1%}",
            "?"
            if feature.hottest_percent_share is None
            else f"{feature.hottest_percent_share:.1%}",
        )
        for name, feature in profile.features.items()
    ]
    header = (
        *("feature", "samples", "ids per sample", "rows touched", "part"),
        *("hottest row's ids", "hottest 1 %'s ids"),
    )
    return format_table(header, rows, right=(1, 2, 3, 4, 5, 6))


def _profile_of(values: Any) -> DataProfile:
    if not isinstance(values, dict) or not {"format", "source", "features"} <= values.keys():
        raise ValueError("it is not a profile")
    if values["format"] != _FORMAT:
        raise ValueError(f"it is of format {values['format']!r}, and this version reads {_FORMAT}")
    source, features = values["source"], values["features"]
    if not isinstance(source, str) or not isinstance(features, dict):
        raise ValueError("source must be a string, and features an object")
    return DataProfile(
        source=source, features={name: _feature_of(name, of) for name, of in features.items()}
    )


def _feature_of(name: str, values: Any) -> FeatureProfile:
    who = f"feature {name!r}"
    if not isinstance(values, dict) or values.keys() != _FIELDS:
        keys = sorted(values.keys() ^ _FIELDS) if isinstance(values, dict) else [values]
        raise ValueError(f"{who} has not the fields of a profile, see {keys[0]!r:.80}")
    values = dict(values)
    share = values.pop("hottest_percent_share")
    blocks, hot_rows = values.pop("block_counts"), values.pop("hot_rows")
    if not isinstance(blocks, list) or not isinstance(hot_rows, dict):
        raise ValueError(f"{who}: block_counts must be a list, and hot_rows an object")
    for count in (*values.values(), *blocks, *hot_rows.values()):
        if type(count) is not int:
            raise ValueError(f"{who}: counts must be integers, got {count!r:.80}")
    if share is not None and not isinstance(share, float):
        raise ValueError(f"{who}: hottest_percent_share must be a float or null, got {share!r:.80}")
    try:
        return FeatureProfile(
            **values,
            block_counts=tuple(blocks),
            hot_rows={int(row): count for row, count in hot_rows.items()},
            hottest_percent_share=share,
        )
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
