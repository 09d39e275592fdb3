"""The `shardemb` command: train, plan, data, doctor. Finds and calls; holds no logic of its own."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from shardemb import __version__

RECIPES = ("dlrm",)
_INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT


def train(argv: Sequence[str]) -> int:
    """Runs a recipe in this process: on one rank, or on those that torchrun started.

    Raises:
        KeyboardInterrupt: Ctrl-C; the process then ends without waiting for other ranks.
    """
    recipe, rest = _recipe(argv, "train")
    module = import_module(f"shardemb.recipes.{recipe}")
    try:
        status: int = module.main(rest, prog="shardemb train")
    except KeyboardInterrupt:
        from shardemb.env import leave_at_once

        leave_at_once(_INTERRUPTED)
        raise
    return status


def plan(argv: Sequence[str]) -> int:
    """Plans where a recipe's tables lie, for any cluster, without processes; compares plans."""
    from shardemb.commands.plan import diff, make

    if argv[:1] == ["diff"]:
        try:
            return diff(argv[1:])
        except (ValueError, OSError) as error:
            return _refuse(error, 2)
        except Exception as error:  # noqa: BLE001 - 1 would mean that the plans differ
            return _refuse(f"{type(error).__name__}: {error}", 2)
    name, rest = _recipe(argv, "plan")
    from shardemb.errors import RunError

    try:
        make(rest, import_module(f"shardemb.recipes.{name}"))
    except (ValueError, OSError, RunError) as error:
        return _refuse(error)
    return 0


def data(argv: Sequence[str]) -> int:
    """Generates a click log, or profiles one: generate, profile."""
    from shardemb.commands.data import COMMANDS as OF_DATA

    if not argv or argv[0] in {"-h", "--help"}:
        return _list_commands(OF_DATA, "shardemb data", asked=bool(argv))
    if argv[0] not in OF_DATA:
        return _refuse(
            f"there is no command 'data {argv[0]}'; there are {', '.join(OF_DATA)}, such as "
            f"shardemb data generate {argv[0]}",
            2,
        )
    from shardemb.errors import RunError

    try:
        return OF_DATA[argv[0]](argv[1:])
    except (ValueError, OSError, RunError) as error:
        return _refuse(error)


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
        return _list_commands(COMMANDS, "shardemb", asked=bool(argv))
    if argv[0] == "--version":
        print(f"shardemb {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return _refuse(f"there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}", 2)
    try:
        return COMMANDS[argv[0]](argv[1:])
    except KeyboardInterrupt:
        return _refuse("interrupted", _INTERRUPTED)


def _list_commands(
    commands: Mapping[str, Callable[[Sequence[str]], int]], prog: str, *, asked: bool
) -> int:
    print(f"usage: {prog} COMMAND [ARGUMENTS]; {prog} COMMAND --help says more\n")
    for name, command in commands.items():
        print(f"  {name:10}{(command.__doc__ or '').splitlines()[0]}")
    return 0 if asked else 2


def _recipe(argv: Sequence[str], command: str) -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser(prog=f"shardemb {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES, default="dlrm")
    asked, rest = parser.parse_known_args(argv)
    return asked.recipe, rest


def _refuse(error: object, status: int = 1) -> int:
    if isinstance(error, BrokenPipeError):  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
