"""`shardemb data`: its commands, generate and profile. Finds and calls; holds no logic."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_PROGRESS_EVERY_S = 5.0


def generate(argv: Sequence[str]) -> int:
    """Writes a generated click log in Criteo's format, with the best AUC it allows.

    Raises:
        FileExistsError: The folder holds a log already.
    """
    parser = argparse.ArgumentParser(
        prog="shardemb data generate", description=(generate.__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", help="folder for train.txt, test.txt and generated.json")
    parser.add_argument("--rows", type=int, default=300_000, help="rows to train on (%(default)s)")
    parser.add_argument(
        "--test-rows", type=int, default=30_000, help="rows to hold out (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator (%(default)s)")
    asked = parser.parse_args(argv)

    from shardemb.data.generated import write_click_log

    if any(Path(asked.out, name).exists() for name in ("train.txt", "test.txt", "generated.json")):
        raise FileExistsError(f"{asked.out} holds a click log already; give another folder")
    log = write_click_log(
        Path(asked.out), num_train=asked.rows, num_test=asked.test_rows, seed=asked.seed
    )
    print(f"{log.folder}: {log.num_train:,} rows to train on, {log.num_test:,} held out")
    print(f"the best AUC on the held-out rows is {log.best_auc:.4f}")
    return 0


def profile(argv: Sequence[str]) -> int:
    """Counts which rows a click log in Criteo's format looks up, for the planner and for you."""
    parser = argparse.ArgumentParser(prog="shardemb data profile", description=profile.__doc__)
    parser.add_argument("data", help="file or folder in Criteo's format; its lines to train on")
    parser.add_argument("--out", help="file to write the profile to, as JSON")
    parser.add_argument(
        "--num-embeddings", type=int, default=100_000, help="rows of each table (%(default)s)"
    )
    parser.add_argument("--max-samples", type=int, help="read the first lines only")
    parser.add_argument(
        "--max-malformed", type=int, default=100, help="lines to skip at most (%(default)s)"
    )
    asked = parser.parse_args(argv)

    from shardemb.data.click_log_profile import profile_click_log
    from shardemb.data.profile_file import describe_profile, save_profile
    from shardemb.files import check_writable

    if asked.out:
        check_writable(asked.out)  # counting takes long
    made = profile_click_log(
        Path(asked.data),
        num_embeddings=asked.num_embeddings,
        max_samples=asked.max_samples,
        max_malformed=asked.max_malformed,
        on_progress=_progress(),
    )
    print(f"{made.source}\n\n{describe_profile(made)}")
    if asked.out:
        save_profile(made, asked.out)
        print(f"\nwritten to {asked.out}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"generate": generate, "profile": profile}


def _progress() -> Callable[[int, int], None]:
    from shardemb.text import format_duration

    begun = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _PROGRESS_EVERY_S or done == total:
            return
        last = now
        left = format_duration((now - begun) * (total - done) / done)
        print(f"{done:,} of {total:,} lines  {left} left", file=sys.stderr, flush=True)

    return show
