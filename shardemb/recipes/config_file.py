"""A recipe's config: a frozen dataclass, made from the command line and from TOML."""

import argparse
import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from shardemb.agree import by_main
from shardemb.env import Env
from shardemb.recipes.run_folder import CONFIG, RunFolder

C = TypeVar("C")
_MAY_DIFFER = {
    "out",
    "resume",
    "steps",
    "num_micro_batches",
    "log_every",
    "checkpoint_every",
    "health_every",
    "max_malformed",
    "plan",
    "kernel",
}
"""Fields that may change when a run goes on."""


def read_config(cls: type[C], argv: Sequence[str] | None, env: Env, *, prog: str) -> C:
    """Reads the command line, over `--config FILE` or over the run that `--resume` goes on with.

    Ranks that the launcher starts again go on with the run that they began.

    Args:
        cls: The frozen dataclass of a recipe, flat, with fields `out` and `resume`.
        argv: Arguments; by default those of the process.
        env: This process; rank 0 prints what there is to say.
        prog: What to call the program in its help.

    Returns:
        The config, the same on all ranks.

    Raises:
        FileNotFoundError: There is no run to resume, or no such config file.
        ValueError: A file names unknown keys, or a typed field differs from what the resumed run
            fixed.
        SystemExit: The command line is wrong, or asks for help.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path)
    file, rest = files.parse_known_args(argv)
    default = cls()
    if file.config and "--resume" in rest:
        raise ValueError("--resume goes on with the run's own config; leave out --config")
    if file.config:
        default = by_main(env, "reading the config", lambda: config_from_toml(cls, file.config))
    parse = partial(_parse, prog=prog, argv=rest, env=env)
    typed = parse(default)
    config: C = by_main(env, "reading the run's config", lambda: _resumed(typed, parse, env))
    return config


def _parse(default: C, *, prog: str, argv: Sequence[str], env: Env) -> C:
    config: C = tyro.cli(
        type(default),
        prog=prog,
        args=argv,
        default=default,
        description=type(default).__doc__,
        console_outputs=env.is_main,
    )
    return config


def _resumed(typed: Any, parse: Callable[[Any], Any], env: Env) -> Any:
    """The config to go on with, if the run is resumed or its job started again; else as typed.

    Raises:
        FileNotFoundError: There is no run to resume.
        ValueError: A typed field differs from what the run fixed.
    """
    folder = Path(typed.out)
    if not typed.resume and not RunFolder(folder).is_of(env.run_id):
        return typed
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"there is no run to resume in {folder}; leave out --resume to start one"
        )
    saved = config_from_toml(type(typed), folder / CONFIG)
    resumed = parse(replace(saved, out=typed.out, resume=True))
    for field in fields(saved):
        now, then = getattr(resumed, field.name), getattr(saved, field.name)
        if now != then and field.name not in _MAY_DIFFER:
            raise ValueError(
                f"--{field.name.replace('_', '-')} is {now!r}, the run in {folder} began with "
                f"{then!r}; resume it as it began, or start another with --out"
            )
    return resumed


def config_to_toml(config: Any) -> str:
    """A flat config as TOML without its Nones; scalars and arrays are written as in JSON."""
    values = {name: value for name, value in asdict(config).items() if value is not None}
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items()
    )


def config_from_toml(cls: type[C], path: Path) -> C:
    """Reads a flat config.

    Args:
        cls: Its frozen dataclass.
        path: The TOML file.

    Returns:
        The config; fields that the file does not name have their defaults.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not TOML, or has a key that the config does not have or a value of
            another kind.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )
    kinds = get_type_hints(cls)
    for name, value in values.items():
        values[name] = _of_kind(value, kinds[name], f"{path}: {name}")
    return cls(**values)


def _of_kind(value: Any, kind: Any, name: str) -> Any:
    """A TOML value as its field has it: str, bool, int, float, one of some, or a tuple of str.

    Raises:
        ValueError: It is of another kind.
    """
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            *others, last = map(repr, get_args(kind))
            raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")
        return value
    kinds = [one for one in get_args(kind) or (kind,) if one not in {type(None), Ellipsis}]
    if get_origin(kind) is tuple:
        if isinstance(value, list) and all(type(item) is kinds[0] for item in value):
            return tuple(value)
    elif type(value) is kinds[0]:
        return value
    elif type(value) is int and kinds[0] is float:
        return float(value)
    shown = f"a list of {kinds[0].__name__}" if get_origin(kind) is tuple else kinds[0].__name__
    raise ValueError(f"{name} must be {shown}, got {value!r}")
