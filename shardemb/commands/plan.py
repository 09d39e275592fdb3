"""`shardemb plan` and `plan diff`: options, the ranks that they name, and what to call."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `diff` needs no torch
    from shardemb.cluster import Cluster
    from shardemb.env import Env

_RANKS_PER_NODE = 2


def make(argv: Sequence[str], recipe: ModuleType) -> None:
    """Prints the plan of a recipe, and saves it if asked.

    Args:
        argv: Options of the command and of the recipe.
        recipe: Has `Config`, `build_model`, `build_plan`, `batch_size_to_plan` and `workload_of`.

    Raises:
        ValueError: An option is out of its range, or a file is damaged or does not fit.
        RunError: The tables do not fit into the memory.
        SystemExit: An option is unknown, or help is asked for.
    """
    parser = _parser()
    asked, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        print("\nThe recipe's own options follow; --recipe NAME chooses another recipe.\n")

    from shardemb.env import Env
    from shardemb.recipes.config_file import read_config

    config = read_config(recipe.Config, rest, Env(), prog="shardemb plan")
    profile = None
    if asked.profile:
        from shardemb.data.profile_file import load_profile

        profile = load_profile(asked.profile)
    where = _where(asked)
    batch_size = config.batch_size or recipe.batch_size_to_plan(where.world_size)
    workload = recipe.workload_of(batch_size, where.world_size, profile)
    plan = recipe.build_plan(config, recipe.build_model(config), where, workload)
    if asked.save:
        plan.save(asked.save)
    if asked.html:
        plan.save_html(asked.html)
    print(plan.to_json() if asked.json else plan)
    for path in filter(None, (asked.save, asked.html)):
        print(f"written to {path}", file=sys.stderr)


def diff(argv: Sequence[str]) -> int:
    """Prints what differs between two plans.

    Args:
        argv: Two files.

    Returns:
        0 if the plans are equal, 1 if they differ.

    Raises:
        ValueError: A file is damaged.
        OSError: A file cannot be read.
        SystemExit: The command line is wrong, or help is asked for.
    """
    parser = argparse.ArgumentParser(
        prog="shardemb plan diff",
        description="Prints what differs between two plans: tables, layouts, ranks and bytes, the "
        "totals of ranks, what a step sends and looks up, and the imbalance.",
        epilog="Exit status: 0 if the plans are equal, 1 if they differ, 2 if there is trouble.",
    )
    parser.add_argument("before", help="a plan of shardemb plan --save or of a run folder")
    parser.add_argument("after", help="another")
    asked = parser.parse_args(argv)

    from shardemb.plans.diff import diff_plans
    from shardemb.plans.file import read_plan

    text = diff_plans(read_plan(asked.before), read_plan(asked.after))
    if text:
        print(text)
    return 1 if text else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardemb plan",
        usage="shardemb plan [options] [the recipe's options]\n"
        "       shardemb plan diff BEFORE AFTER",
        description="Prints where a recipe's tables lie, what that costs each rank in memory and "
        "in a step, and why. Needs neither the machines nor the data.",
        add_help=False,
        allow_abbrev=False,
    )
    ranks = parser.add_argument_group("the ranks to plan for")
    machine = ranks.add_mutually_exclusive_group()
    machine.add_argument(
        "--cluster", metavar="NAME", help="a common machine, such as h100; each node has 8 GPUs"
    )
    machine.add_argument(
        "--probe", action="store_true", help="this machine: measures its memory and bandwidths"
    )
    ranks.add_argument("--num-nodes", type=int, default=1, help="number of nodes (1)")
    ranks.add_argument(
        "--world-size",
        type=int,
        help="number of ranks on all nodes (2 on each, and with --cluster 8)",
    )
    batches = parser.add_argument_group(
        "the batches", "--batch-size, samples of a step on all ranks together, as in training"
    )
    batches.add_argument(
        "--profile",
        metavar="FILE",
        type=Path,
        help="of shardemb data profile: measured ids per sample, and how ids spread over rows",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--save", metavar="FILE", type=Path, help="the plan as a file, for train --plan FILE"
    )
    output.add_argument(
        "--html", metavar="FILE", type=Path, help="a page with memory and load of each rank"
    )
    output.add_argument("--json", action="store_true", help="print all as JSON, not as tables")
    return parser


def _where(asked: argparse.Namespace) -> "Env | Cluster":
    """The ranks that are asked for.

    Raises:
        ValueError: They do not divide by the nodes, or there is no such machine.
    """
    from shardemb.cluster import Cluster
    from shardemb.env import Env
    from shardemb.planning.probe import probe

    is_given = asked.world_size is not None
    world_size = asked.world_size if is_given else _RANKS_PER_NODE * asked.num_nodes
    env = Env(world_size=world_size, num_nodes=asked.num_nodes)  # refuses what does not divide
    if asked.cluster is not None:
        on_each = {"ranks_per_node": env.local_world_size} if is_given else {}
        return Cluster.preset(asked.cluster, num_nodes=asked.num_nodes, **on_each)
    if asked.probe:
        here = probe(num_ranks=env.local_world_size if is_given else None, out=sys.stderr)
        return replace(here, num_nodes=asked.num_nodes)
    return env
