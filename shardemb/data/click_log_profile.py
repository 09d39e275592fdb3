"""The profile of a click log on disk, as the recipe's hash makes rows of its categories."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shardemb.data.click_log import CriteoLoader, open_click_log
from shardemb.data.clicks import CATEGORY_NAMES
from shardemb.data.profile import DataProfile
from shardemb.data.profile_counter import ProfileCounter
from shardemb.env import Env, hide_notices

_BATCH_SIZE = 32_768


def profile_click_log(
    path: Path,
    *,
    num_embeddings: int,
    max_samples: int | None = None,
    max_malformed: int = 100,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataProfile:
    """Counts what the lines to train on look up; one process reads them all.

    Args:
        path: A file or folder in Criteo's format, as `open_click_log` finds it.
        num_embeddings: Rows of each of the 26 tables, into which categories are hashed.
        max_samples: Lines to read, the first ones; None reads all.
        max_malformed: Malformed lines after which the data is taken not to be Criteo's. Those that
            are skipped are no samples.
        on_progress: Called with the lines read and those to read, after each part of them.

    Returns:
        By the names of the categories, C1 to C26.

    Raises:
        ValueError: There is no click log, too much of it is malformed, or a number is out of range.
    """
    for name, value in (("num_embeddings", num_embeddings), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    hide_notices()
    lines = open_click_log(path, env=Env()).train
    if max_samples is not None:
        lines = replace(lines, num_lines=min(max_samples, lines.num_lines))
    batch_size = min(_BATCH_SIZE, lines.num_lines)
    loader = CriteoLoader(
        lines,
        env=Env(),
        batch_size=batch_size,
        num_embeddings_F=[num_embeddings] * len(CATEGORY_NAMES),
        repeat=False,
        max_malformed=max_malformed,
    )
    counter = ProfileCounter(dict.fromkeys(CATEGORY_NAMES, num_embeddings))
    for number, batch in enumerate(loader, start=1):
        counter.add(batch.sparse, int(batch.weights_B.sum()))
        if on_progress is not None:
            on_progress(min(number * batch_size, lines.num_lines), lines.num_lines)
    return counter.profile(f"{lines} in {path}")
