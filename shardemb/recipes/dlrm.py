"""Trains a DLRM on a click log in Criteo's format, or on a generated one, sharded over all ranks.

torchx run -s local_cwd shardemb.train -j 1x2 -- --data FOLDER --out runs/dlrm
"""

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import shardemb as se
from shardemb import layouts, optim
from shardemb.agree import by_main
from shardemb.cluster import Cluster
from shardemb.data.click_log import CriteoLoader, open_click_log
from shardemb.data.clicks import CATEGORY_NAMES, INTEGER_NAMES
from shardemb.data.generated import GeneratedLog, read_generated, write_click_log
from shardemb.data.profile import DataProfile
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.kernel_choice import KernelChoice
from shardemb.layouts import Layout
from shardemb.metrics import click_metrics
from shardemb.models.dlrm import DLRM, ClickModel
from shardemb.placement import ShardingPlan
from shardemb.plans.file import read_plan
from shardemb.plans.text import describe_ranks
from shardemb.recipes.config_file import config_to_toml, read_config
from shardemb.recipes.console import refuse, say_on_main
from shardemb.recipes.progress import Progress
from shardemb.recipes.run_folder import CONFIG, DATA, PLAN, RESULT, RunFolder, open_run
from shardemb.workload import Workload

_BATCH_SIZES = (960, 480, 240, 120, 60, 30)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a DLRM on a click log, sharded over all ranks."""

    data: str | None = None
    """A file or folder in the format of the Criteo challenge; by default a log is generated in the
    run folder."""
    out: str = "runs/dlrm"
    """The run folder: config.toml, plan.json, metrics.jsonl, checkpoints/ and at the end
    metrics.json."""
    resume: bool = False
    """Go on from the last checkpoint in the run folder."""
    steps: int | None = None
    """Steps in all; by default one pass over the data, as in a second one the rows overfit."""
    batch_size: int | None = None
    """Samples of a step on all ranks together; by default 960, which many numbers of ranks divide,
    or for small data its half, quarter and so on that gives 100 steps a pass."""
    num_micro_batches: int = 1
    """Parts of a step that each rank computes one after the other, before its one update: the same
    step in less memory."""
    seed: int = 0
    """Of the initial values of rows and dense parameters, and of the generated log."""
    num_embeddings: int = 100_000
    """Rows of each of the 26 tables; categories are hashed into them."""
    embedding_dim: int = 16
    """Columns of each table."""
    plan: str | None = None
    """A plan to train by exactly, of shardemb plan --save or another run's plan.json. Without it
    `row_wise` counts. A resumed run on other ranks plans anew."""
    row_wise: tuple[str, ...] = ("C3", "C12", "C16", "C21")
    """Tables sharded by rows over all ranks, as Criteo's largest four would be; the others lie
    whole on one rank."""
    kernel: KernelChoice = "auto"
    """What looks up and updates the rows: native, shardemb's own on CPU, or fbgemm; auto is native
    where it runs."""
    sparse_lr: float = 0.02
    """Learning rate of the rows (row-wise Adagrad)."""
    dense_lr: float = 1e-3
    """Learning rate of the dense parameters (AdamW)."""
    max_norm: float | None = None
    """Largest norm of all gradients of a step together, of rows and dense parameters; larger ones
    are scaled down to it. By default they are not."""
    log_every: int = 50
    """Steps between two lines of progress."""
    health_every: int = 0
    """Steps between two reports of training health: ids and rows of each table, rows never touched
    and gradient norms; 0 for none."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; there is one more at the end."""
    max_malformed: int = 100
    """Malformed lines that a rank may skip before it takes the data to be of another format."""
    generated_rows: int = 300_000
    """Rows of the generated log to train on; a tenth as many are held out."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be in 0..2**63-1, got {self.seed}")
        for name in ("max_malformed", "health_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("sparse_lr", "dense_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        if self.max_norm is not None and not 0 < self.max_norm < math.inf:
            raise ValueError(f"max_norm must be a positive number, got {self.max_norm}")
        for name in (
            "num_embeddings",
            "embedding_dim",
            "num_micro_batches",
            "log_every",
            "checkpoint_every",
            "generated_rows",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("data", "out", "plan"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must not be empty")
        unknown = sorted(set(self.row_wise) - set(CATEGORY_NAMES))
        if unknown:
            raise ValueError(f"row_wise names table {unknown[0]!r}; the tables are C1 to C26")


def train(config: Config, env: Env) -> None:
    """Trains, evaluates, and leaves a run folder.

    Args:
        config: What to train.
        env: This process.

    Raises:
        ValueError: The config does not fit the data or the ranks.
    """
    say = say_on_main(env)

    # Model, plan, data: what can be refused is, before anything is written
    folder = RunFolder(config.out)
    split = None if config.data is None else open_click_log(Path(config.data), env=env)
    num_samples = split.train.num_lines if split else config.generated_rows
    batch_size = config.batch_size or default_batch_size(num_samples)
    workload = workload_of(batch_size, env.world_size)
    micro_batch_size = micro_batch_size_of(batch_size, config.num_micro_batches, env.world_size)
    model = build_model(config)
    plan = build_plan(without_plan_of_others(config, env), model, env, workload)
    open_run(folder, config_to_toml(config), env, resume=config.resume)
    best_auc = None
    if split is None:
        log = by_main(env, "generating a click log", lambda: generate_log(config, folder))
        split, best_auc = open_click_log(log.folder, env=env), log.best_auc
    one_pass = -(-split.train.num_lines // batch_size)
    num_steps = config.steps or one_pass
    config = replace(config, steps=num_steps, batch_size=batch_size)
    make_loader = partial(
        CriteoLoader,
        env=env,
        batch_size=micro_batch_size,
        num_embeddings_F=[config.num_embeddings] * len(CATEGORY_NAMES),
        max_malformed=config.max_malformed,
    )
    say(
        f"{split.train} to train on, {split.held_out} held out; {num_steps:,} steps of "
        f"{batch_size:,} samples ({num_steps / one_pass:.1f} passes)"
    )

    # Shards, optimizer
    say(f"\n{plan}\n")
    model = se.shard_modules(model, plan, env, declared_order=False)  # DLRM reads by name
    optimizer = se.build_optimizer(
        model,
        dense=lambda p: torch.optim.AdamW(p, lr=config.dense_lr),
        max_norm=config.max_norm,
    )

    # Resume
    first_step = 0
    checkpoint = by_main(env, "looking for a checkpoint", lambda: folder.last_checkpoint)
    if checkpoint is not None:
        first_step = se.load_checkpoint(checkpoint, model, optimizer, env=env)
        say(f"going on from {checkpoint}, after step {first_step:,} of {num_steps:,}")

    def write_down() -> None:
        folder.keep(DATA, split.describe())
        folder.write(CONFIG, config_to_toml(replace(config, resume=False)))
        plan.save(folder.path / PLAN)
        folder.forget_after(first_step)

    by_main(env, f"writing to {folder.path}", write_down)

    # Train
    loader = make_loader(split.train, start_step=first_step * config.num_micro_batches)
    progress = Progress(
        folder if env.is_main else None,
        num_steps=num_steps,
        batch_size=batch_size,
        log_every=config.log_every,
        first_step=first_step,
    )
    health = se.TrainingHealth(optimizer) if config.health_every else None
    pipeline = se.TrainPipeline(model, optimizer, env, num_micro_batches=config.num_micro_batches)
    for step, loss in pipeline.run(loader, num_steps, first_step=first_step):
        progress.step(step, loss)
        if health and step % config.health_every == 0:
            say(f"\n{health.report()}\n")
        if step % config.checkpoint_every == 0 or step == num_steps:
            checkpoint = se.save_checkpoint(
                folder.checkpoint_path(step), model, optimizer, step=step, env=env
            )
            by_main(env, "removing old checkpoints", folder.drop_old_checkpoints)
            progress.restart_clock()

    # Evaluate
    held_out = make_loader(split.held_out, repeat=False)
    result = evaluate(pipeline, held_out, env) | {
        "samples_per_second": round(progress.samples_per_second or folder.last_speed),
        "world_size": env.world_size,
        "steps": max(num_steps, first_step),
        "malformed_lines": sum(
            len(union_over_ranks(read.malformed_lines, env)) for read in (loader, held_out)
        ),
        "checkpoint": str(checkpoint),
    }
    if best_auc is not None:
        result["best_auc"] = best_auc
    text = json.dumps(result, indent=2) + "\n"
    by_main(env, f"writing to {folder.path}", lambda: folder.write(RESULT, text))
    say(f"\n{describe(result)}")


def build_model(config: Config) -> nn.Module:
    """The model, its tables on meta."""
    tables = [
        se.TableConfig(
            name=name,
            num_embeddings=config.num_embeddings,
            embedding_dim=config.embedding_dim,
            feature_names=(name,),
            optimizer=optim.RowWiseAdagrad(lr=config.sparse_lr),
        )
        for name in CATEGORY_NAMES
    ]
    torch.manual_seed(config.seed)
    return ClickModel(
        DLRM(
            se.EmbeddingBagCollection(tables, seed=config.seed),
            feature_names=CATEGORY_NAMES,
            embedding_dim=config.embedding_dim,
            num_dense=2 * len(INTEGER_NAMES),
        )
    )


def build_layouts(config: Config) -> dict[str, Layout]:
    """Row-wise for the tables that the config names, table-wise for the others."""
    return {
        name: layouts.row_wise() if name in config.row_wise else layouts.table_wise()
        for name in CATEGORY_NAMES
    }


def workload_of(batch_size: int, world_size: int, profile: DataProfile | None = None) -> Workload:
    """What one rank looks up in a step of `batch_size` samples on all ranks.

    Raises:
        ValueError: The batch does not divide by the ranks.
    """
    if batch_size % world_size:
        raise ValueError(
            f"a batch of {batch_size} samples does not divide by {world_size} ranks; give "
            f"--batch-size a multiple of {world_size}"
        )
    return Workload(batch_size=batch_size // world_size, profile=profile)


def micro_batch_size_of(batch_size: int, num_micro_batches: int, world_size: int) -> int:
    """Samples of a micro-batch on all ranks together.

    Raises:
        ValueError: The batch does not divide by the micro-batches of all ranks.
    """
    if batch_size % (num_micro_batches * world_size):
        raise ValueError(
            f"a batch of {batch_size} samples does not divide by {num_micro_batches} micro-batches "
            f"of {world_size} ranks; give --batch-size a multiple of "
            f"{num_micro_batches * world_size}"
        )
    return batch_size // num_micro_batches


def build_plan(
    config: Config, model: nn.Module, where: Env | Cluster, workload: Workload
) -> ShardingPlan:
    """The plan of the file that the config names, if it fits, or a new one.

    Raises:
        ValueError: The file is for another kernel than the config.
    """
    if config.plan is None:
        return se.plan_sharding(
            model, where, build_layouts(config), workload=workload, kernel=config.kernel
        )
    plan = se.load_plan(config.plan, model, where)
    if config.kernel not in {"auto", plan.kernel}:
        raise ValueError(
            f"--kernel is {config.kernel!r}, and the plan in {config.plan} is for kernel "
            f"{plan.kernel!r}; leave out one of them"
        )
    return plan


def without_plan_of_others(config: Config, env: Env) -> Config:
    """The config of a run that goes on, without its plan if that is for other ranks."""
    if not config.resume or config.plan is None:
        return config
    path = config.plan
    cluster = by_main(env, f"reading the plan {path}", lambda: read_plan(path).cluster)
    if (cluster.world_size, cluster.num_nodes) == (env.world_size, env.num_nodes):
        return config
    say_on_main(env)(
        f"{path} is a plan for {describe_ranks(cluster)}, and the run goes on with "
        f"{env.world_size} on {env.num_nodes}: planning anew"
    )
    return replace(config, plan=None)


def generate_log(config: Config, folder: RunFolder) -> GeneratedLog:
    """The generated log of a run: the one it has, or a new one."""
    path = folder.path / "data"
    if (path / "generated.json").exists():
        log = read_generated(path)
        if (log.num_train, log.seed) == (config.generated_rows, config.seed):
            return log
    print(f"generating a click log of {config.generated_rows:,} rows in {path}", flush=True)
    return write_click_log(
        path,
        num_train=config.generated_rows,
        num_test=max(2, config.generated_rows // 10),
        seed=config.seed,
    )


def default_batch_size(num_samples: int) -> int:
    """960, or its half, quarter ... down to 30, whichever first gives at least 100 steps a pass."""
    return next((size for size in _BATCH_SIZES if size * 100 <= num_samples), _BATCH_SIZES[-1])


def batch_size_to_plan(world_size: int) -> int:
    """The default for large data, or the next larger size that the ranks can share evenly.

    Example:
        >>> batch_size_to_plan(8), batch_size_to_plan(512)
        (960, 1024)
    """
    return -(-_BATCH_SIZES[0] // world_size) * world_size


def evaluate(pipeline: se.TrainPipeline, loader: CriteoLoader, env: Env) -> dict[str, float]:
    """AUC, log loss and normalized entropy on all ranks' samples, in the order of the log."""
    parts = [
        torch.stack([logits_B, batch.labels_B, batch.weights_B]).cpu()
        for batch, (_, logits_B) in pipeline.evaluate(loader)
    ]
    mine = torch.stack(parts, 1)  # three kinds, steps, samples of this rank
    of_ranks = [torch.empty_like(mine) for _ in range(env.world_size)]
    dist.all_gather(of_ranks, mine)
    logits_N, labels_N, weights_N = torch.stack(of_ranks, 2).flatten(1)
    return click_metrics(logits_N, labels_N, weights_N)


def union_over_ranks(lines: frozenset[int], env: Env) -> frozenset[int]:
    """The lines of all ranks: in another pass another rank may read a line."""
    of_ranks = [lines] * env.world_size
    dist.all_gather_object(of_ranks, lines)
    return frozenset().union(*of_ranks)


def describe(result: dict[str, Any]) -> str:
    """What a run reached, for people."""
    lines = [
        f"held out: AUC {result['auc']:.4f}  log loss {result['log_loss']:.4f}  normalized "
        f"entropy {result['normalized_entropy']:.4f}  ({result['num_samples']:,} samples)"
    ]
    if "best_auc" in result:
        way = (result["auc"] - 0.5) / (result["best_auc"] - 0.5)
        lines.append(
            f"the best that this log allows: AUC {result['best_auc']:.4f}; reached {way:.1%} of "
            "the way from 0.5"
        )
    ranks = f"{result['world_size']} rank{'s' * (result['world_size'] > 1)}"
    lines.append(f"trained {result['samples_per_second']:,} samples/s on {ranks}")
    lines.append(f"checkpoint: {result['checkpoint']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, *, prog: str = "shardemb.recipes.dlrm") -> int:
    """Runs the recipe.

    Args:
        argv: Arguments; by default those of the process.
        prog: What to call the program in its help.

    Returns:
        The exit status of the process.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    env = se.init_distributed()
    try:
        train(read_config(Config, argv, env, prog=prog), env)
    except (ValueError, OSError, RunError) as error:
        refused = error
    else:
        return 0
    return refuse(refused)


if __name__ == "__main__":
    sys.exit(main())
