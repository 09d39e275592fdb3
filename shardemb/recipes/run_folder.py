"""The folder of a run: config, plan, progress, checkpoints, result. Never overwrites a run."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

from shardemb.agree import all_or_none, by_main
from shardemb.checkpoint import latest_checkpoint
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.files import write_whole

CONFIG, DATA, PLAN = "config.toml", "data.json", "plan.json"
_RUN_ID, _LOCK = "run_id", "lock"
PROGRESS, RESULT = "metrics.jsonl", "metrics.json"
_CHECKPOINTS = "checkpoints"


class RunFolder:
    """Where a run writes. Only rank 0 writes; every rank may ask for paths.

    Args:
        path: The folder.
        num_kept: Checkpoints to keep, the newest.
    """

    def __init__(self, path: str | Path, *, num_kept: int = 2) -> None:
        self.path = Path(path)
        self._num_kept = num_kept

    def lock(self) -> None:
        """Keeps other runs out of the folder for as long as this process lives.

        Raises:
            RunError: Another run has it.
        """
        self._lock = open(self.path / _LOCK, "w", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"another run writes to {self.path}; wait for it, or end its processes, or give "
                "another --out"
            ) from error

    def is_of(self, run_id: str | None) -> bool:
        """Whether the launcher's job of that name began the run, so that it starts again."""
        file = self.path / _RUN_ID
        return run_id is not None and file.is_file() and file.read_text() == run_id

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return latest_checkpoint(self.path / _CHECKPOINTS)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after a step belongs."""
        return self.path / _CHECKPOINTS / f"{step:08d}"

    def write(self, name: str, text: str) -> None:
        """Writes a file whole: it is replaced in one move."""
        write_whole(self.path / name, text)

    def keep(self, name: str, text: str) -> None:
        """Writes a file that stays as it is when the run goes on.

        Args:
            name: Of the file.
            text: What it holds.

        Raises:
            ValueError: The file is there and holds something else.
        """
        path = self.path / name
        if not path.exists() or self.last_checkpoint is None:
            self.write(name, text)
        elif path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"the run in {self.path} began with other data than now, as {path} tells; start "
                "another run with --out"
            )

    @property
    def last_speed(self) -> float:
        """Samples a second as logged last."""
        progress = self.path / PROGRESS
        entries = progress.read_text().splitlines() if progress.exists() else []
        return float(json.loads(entries[-1])["samples_per_second"]) if entries else 0.0

    def log(self, entry: dict[str, Any]) -> None:
        """Appends a line of JSON to the progress."""
        with open(self.path / PROGRESS, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops what is beyond a step, which a resumed run will do again, and what is broken."""
        for checkpoint in (self.path / _CHECKPOINTS).glob("*"):
            number = int(checkpoint.name) if checkpoint.name.isdigit() else None
            if number is None or number > step:
                shutil.rmtree(checkpoint)
        progress = self.path / PROGRESS
        if progress.exists():
            entries = [line for line in progress.read_text().splitlines() if _is_whole(line)]
            kept = [line for line in entries if json.loads(line)["step"] <= step]
            self.write(PROGRESS, "".join(f"{line}\n" for line in kept))
        (self.path / RESULT).unlink(missing_ok=True)

    def drop_old_checkpoints(self) -> None:
        """Removes all checkpoints but the newest."""
        found = [path for path in (self.path / _CHECKPOINTS).iterdir() if path.name.isdigit()]
        for old in sorted(found, key=lambda path: int(path.name))[: -self._num_kept]:
            shutil.rmtree(old)


def open_run(folder: RunFolder, config: str, env: Env, *, resume: bool) -> None:
    """Makes the folder of a run and puts its config there; leaves that of a resumed run.

    Args:
        folder: The folder.
        config: The run's config as TOML.
        env: This process.
        resume: Whether a run that the folder holds goes on.

    Raises:
        FileExistsError: The folder holds a run and `resume` is false, or it holds other files.
        RunError: A rank does not see the folder, or rank 0 refused it.
    """

    def open_on_main() -> None:
        if not resume:
            _check_unused(folder)
            folder.path.mkdir(parents=True, exist_ok=True)
        folder.lock()
        if not resume:
            folder.write(CONFIG, config)
            folder.write(_RUN_ID, env.run_id or "")

    by_main(env, f"opening the run folder {folder.path}", open_on_main)
    with all_or_none(env, f"looking at the run folder {folder.path}"):
        if not (folder.path / CONFIG).is_file():
            raise RunError(
                f"rank {env.rank} does not see {folder.path}, which rank 0 made; put --out on a "
                "filesystem that all nodes share"
            )


def _check_unused(folder: RunFolder) -> None:
    """Refuses a folder with a run that has trained, or with anything that is not a run.

    Raises:
        FileExistsError: It holds a run or other files.
    """
    path, last = folder.path, folder.last_checkpoint
    if (path / PROGRESS).exists() or last is not None:
        state = f"last checkpoint after step {int(last.name)}" if last else "no checkpoint yet"
        raise FileExistsError(
            f"{path} holds a run already ({state}). To go on with it add --resume (make train "
            "ARGS=--resume); to keep it and start another give --out FOLDER (make train "
            "OUT=FOLDER)"
        )
    is_run = (path / CONFIG).is_file()
    is_empty = path.is_dir() and {file.name for file in path.iterdir()} <= {_LOCK}
    if path.exists() and not is_run and not is_empty:
        raise FileExistsError(f"{path} exists and is not a run; give --out a new or empty folder")


def _is_whole(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed
        return False
