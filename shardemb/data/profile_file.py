"""Writes and reads a `DataProfile` as a JSON file, and prints it. Counts nothing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardemb.data.profile import DataProfile
from shardemb.files import write_whole
from shardemb.text import format_table
from shardemb.typed_json import make_typed, parse_json

_FORMAT = 1


def save_profile(profile: DataProfile, path: str | Path) -> None:
    """Writes a profile, a feature a line; a file that is there is replaced in one move.

    Args:
        profile: What to write.
        path: The file.

    Raises:
        OSError: It cannot be written.
    """
    features = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(asdict(feature))}"
        for name, feature in profile.features.items()
    )
    text = (
        f'{{"format": {_FORMAT}, "source": {json.dumps(profile.source)}, "features": {{\n'
        f"{features}\n}}}}\n"
    )
    write_whole(path, text)


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
        >>> from shardemb.data.profile import FeatureProfile
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
        return _profile_of(parse_json(path.read_text(encoding="utf-8")))
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
    if not isinstance(values, dict) or "format" not in values:
        raise ValueError("it is not a profile")
    if values["format"] != _FORMAT:
        raise ValueError(f"it is of format {values['format']!r}, and this version reads {_FORMAT}")
    rest = {name: value for name, value in values.items() if name != "format"}
    return make_typed(DataProfile, rest, "the profile")
