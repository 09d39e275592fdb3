"""Progress of a run: a line now and then for people, and the same as JSON for programs."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from shardemb.data.id_counts import IdCount, changes_of, describe_changes
from shardemb.recipes.run_folder import RunFolder
from shardemb.text import format_duration


class Progress:
    """Counts time spent in steps; rank 0 prints and logs.

    Args:
        folder: Where the JSON lines go; None on ranks that print nothing.
        num_steps: The step after which the run ends.
        batch_size: Samples of a step on all ranks together.
        log_every: Steps between two lines.
        first_step: Steps done before this run.
        id_counts: Gives the counts of ids, of which those that were changed are shown. Every rank
            calls it at each line, so that it may sum over ranks:
            `lambda: batcher.counts.of_all_ranks(env)`.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        *,
        num_steps: int,
        batch_size: int,
        log_every: int,
        first_step: int = 0,
        id_counts: Callable[[], Mapping[str, IdCount]] | None = None,
    ) -> None:
        self._folder, self._num_steps, self._batch_size = folder, num_steps, batch_size
        self._log_every, self._first_step = log_every, first_step
        self._id_counts = id_counts
        self._seconds = 0.0
        self._losses: list[Any] = []
        self._steps_timed = 0
        self._resumed_at = time.perf_counter()

    def step(self, step: int, loss: Any) -> None:
        """Notes a step; the first of a run, which sets things up, is not timed.

        Args:
            step: Steps done.
            loss: Loss of the global batch.
        """
        self._losses.append(loss)
        now = time.perf_counter()
        if step > self._first_step + 1:
            self._seconds += now - self._resumed_at
            self._steps_timed += 1
        self._resumed_at = now
        if step % self._log_every == 0 or step in {1, self._num_steps}:
            self._report(step)

    def restart_clock(self) -> None:
        """Leaves what was not training, such as a checkpoint, out of the speed."""
        self._resumed_at = time.perf_counter()

    @property
    def samples_per_second(self) -> float:
        """Samples trained a second on all ranks together."""
        return self._steps_timed * self._batch_size / self._seconds if self._seconds else 0.0

    def _report(self, step: int) -> None:
        loss = sum(float(loss) for loss in self._losses) / len(self._losses)
        self._losses.clear()
        id_counts = self._id_counts() if self._id_counts else {}  # a collective
        if self._folder is None:
            return
        speed = self.samples_per_second
        line = f"step {step:>{len(f'{self._num_steps:,}')},}/{self._num_steps:,}  loss {loss:.4f}"
        if speed:
            left = format_duration((self._num_steps - step) * self._batch_size / speed)
            line += f"  {speed:>9,.0f} samples/s  {left} left"
        entry: dict[str, Any] = {"step": step, "loss": loss, "samples_per_second": speed}
        changes = changes_of(id_counts)
        if changes:
            line += f"  {describe_changes(id_counts)}"
            entry["ids"] = changes
        print(line, flush=True)
        try:
            self._folder.log(entry)
        except OSError as error:  # the run itself can go on
            logging.getLogger("shardemb").warning("progress is not logged: %s", error)
