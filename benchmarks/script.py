"""What every script here does alike: its arguments, and where its result goes."""

import argparse
import json
from pathlib import Path
from typing import Any


def parser_of(
    description: str | None, *, repeats: int, warmup: int | None = None
) -> argparse.ArgumentParser:
    """The arguments of a script, of which some have no warm-up."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the result, JSON and a page named by the date; without it the page is "
        "only printed",
    )
    if warmup is not None:
        parser.add_argument(
            "--warmup",
            type=int,
            default=warmup,
            help="steps before that, not measured (default: %(default)s)",
        )
    parser.add_argument(
        "--repeats",
        type=int,
        default=repeats,
        help="how often each is measured (default: %(default)s)",
    )
    return parser


def listed(machine: dict[str, str]) -> str:
    """What `describe` found, a line each."""
    return "\n".join(f"- {name}: {value}" for name, value in machine.items())


def write_result(measured: dict[str, Any], page: str, out: Path | None, name: str) -> None:
    """Prints the page, and writes it with its JSON where a folder was named."""
    print(page)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    dated = f"{measured['machine']['date']}-{name}"
    (out / f"{dated}.json").write_text(json.dumps(measured, indent=1) + "\n")
    (out / f"{dated}.md").write_text(page)
