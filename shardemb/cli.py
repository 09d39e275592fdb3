"""The `shardemb` command: train, plan, data, doctor. Finds and calls; holds no logic of its own."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from shardemb import __version__

RECIPES = ("dlrm",)


def train(argv: Sequence[str]) -> int:
    """Runs a recipe in this process: on one rank, or on those that torchrun started."""
    recipe, rest = _recipe(argv, "train")
    status: int = import_module(f"shardemb.recipes.{recipe}").main(rest, prog="shardemb train")
    return status


def plan(argv: Sequence[str]) -> int:
    """Plans where a recipe's tables lie, for any cluster, without processes; compares plans."""
    from shardemb.plan_command import diff, make

    if argv[:1] == ["diff"]:
        try:
            return diff(argv[1:])
        except (ValueError, OSError) as error:
            return _refuse(error, 2)
    name, rest = _recipe(argv, "plan")
    from shardemb.errors import RunError

    try:
        make(rest, import_module(f"shardemb.recipes.{name}"))
    except (ValueError, OSError, RunError) as error:
        return _refuse(error)
    return 0


def data(argv: Sequence[str]) -> int:
    """Writes a generated click log in Criteo's format, with the best AUC it allows."""
    parser = argparse.ArgumentParser(prog="shardemb data", description=data.__doc__)
    parser.add_argument("out", help="folder for train.txt, test.txt and generated.json")
    parser.add_argument("--rows", type=int, default=300_000, help="rows to train on")
    parser.add_argument("--test-rows", type=int, default=30_000, help="rows to hold out")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator")
    asked = parser.parse_args(argv)

    from pathlib import Path

    from shardemb.data.generated import write_click_log

    try:
        log = write_click_log(
            Path(asked.out), num_train=asked.rows, num_test=asked.test_rows, seed=asked.seed
        )
    except (ValueError, OSError) as error:
        return _refuse(error)
    print(f"{log.folder}: {log.num_train:,} rows to train on, {log.num_test:,} held out")
    print(f"the best AUC on the held-out rows is {log.best_auc:.4f}")
    return 0


def doctor(argv: Sequence[str]) -> int:
    """Says which versions are there, whether they fit, and what to type when something is off."""
    argparse.ArgumentParser(prog="shardemb doctor", description=doctor.__doc__).parse_args(argv)
    from shardemb.doctor import main as diagnose

    return diagnose()


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "plan": plan,
    "data": data,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status of the process."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in {"-h", "--help"}:
        print("usage: shardemb COMMAND [ARGUMENTS]; shardemb COMMAND --help says more\n")
        for name, command in COMMANDS.items():
            print(f"  {name:8}{command.__doc__}")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"shardemb {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return _refuse(f"there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}", 2)
    return COMMANDS[argv[0]](argv[1:])


def _recipe(argv: Sequence[str], command: str) -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser(prog=f"shardemb {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES, default="dlrm")
    asked, rest = parser.parse_known_args(argv)
    return asked.recipe, rest


def _refuse(error: object, status: int = 1) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
