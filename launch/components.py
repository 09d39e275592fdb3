"""What torchx runs: a recipe on every rank. Builds the job, starts and opens nothing.

torchx 0.7 imports this file, or executes it by its path: so it imports torchx and the standard
library only, nothing relative, and is annotated as torchx can parse (`Optional[...]`, `Dict[...]`).
"""

import re
from typing import Dict, List, Optional

import torchx
from torchx import specs
from torchx.components.dist import ddp, parse_nnodes
from torchx.specs.finder import ComponentValidationException

# Beside its shard a rank holds 0.4 GB of imports, its batches and, see MALLOC_*, what it has freed.
# At torchx's own default, 1,024 MB a node, Slurm and Kubernetes kill the job.
_MEM_MB_PER_RANK = 8192
_CPUS_PER_RANK = 2

_ENV = {
    # In the store that torchrun shares with its ranks, restarted ranks hang on stale addresses.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # glibc gives freed blocks over 32 MB back to the system: each step pays for their page faults
    # again and takes 2-3 times as long. So: never map them, and trim above 1 TiB only.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    # On Ctrl-C a local torchx kills torchrun after 10 s, torchrun a rank that is busy saving after
    # 30 s: that rank would stay behind for good.
    "PET_SHUTDOWN_TIMEOUT": "8",
    # Progress shows when it is printed.
    "PYTHONUNBUFFERED": "1",
    # Marks lines with the global rank; torchrun's own mark is the local one, the same on each node.
    "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[$${rank}]:",
}

# Only the node knows the cores that the job may use: by affinity, and by the quota of a container.
# torchrun by itself sets 1 thread where a node has several ranks, and none where it has one.
_SET_THREADS = (
    'if [ -z "$OMP_NUM_THREADS" ]; then'
    " cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN);"
    " if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ $quota != max ]"
    " && [ $((quota / period)) -lt $cores ]; then cores=$((quota / period)); fi;"
    " threads=$((cores / RANKS)); export OMP_NUM_THREADS=$((threads > 0 ? threads : 1)); fi; "
)


class UsageError(ComponentValidationException, ValueError):  # type: ignore[misc]  # has no types
    """What was asked for cannot be launched. torchx shows such a message without a traceback."""


def train(
    *args: str,
    recipe: str = "dlrm",
    j: str = "1x2",
    h: Optional[str] = None,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    name: str = "/",
    image: str = torchx.IMAGE,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Runs a recipe of shardemb on every rank, on a laptop or a cluster.

    torchx run -s local_cwd shardemb.train -j 1x2 -- --steps 100 --out runs/dlrm

    Args:
        args: what follows -- goes to the recipe as typed; only ${app_id} becomes the id of the job
        recipe: which one, python -m shardemb.recipes.<recipe>
        j: nodes x ranks on each: 1x2, 4x8; 2:4x8 starts with 2 to 4 nodes
        h: a named resource of torchx, in place of cpu, gpu and memMB
        cpu: cores of a node; 0 asks for 2 a rank
        gpu: GPUs of a node, one for each rank or none
        memMB: memory of a node; 0 asks for 8192 a rank; on CPU the tables must fit in it
        name: of the job, experiment/run, either may be empty
        image: container with shardemb in it; local_cwd and slurm take the environment of the caller
        env: variables for the ranks, A=1,B=2; they win over those that this component sets; on
            slurm a value must not hold a comma
        max_retries: how often failed ranks start again, and the job, where the scheduler can
        rdzv_port: where the nodes meet, on the first; jobs that share a node need different ones
        mounts: for containers, type=bind,src=/host,dst=/job[,readonly]

    Returns:
        The job: one role, a replica for each node.

    Raises:
        UsageError: Something asked for cannot be launched; the message says what and why.
    """
    ranks = _ranks_per_node(j)
    if not (recipe.isascii() and recipe.isidentifier()):
        raise UsageError(
            f"recipe {recipe!r} must be the name of a module in shardemb.recipes, such as dlrm;"
            " launch a script of your own with dist.ddp --script"
        )
    if max_retries < 0:
        raise UsageError(f"--max_retries must not be negative, got {max_retries}")
    _check_node(j, ranks, h, cpu, gpu, memMB)

    job_env = _ENV | {key: _verbatim(value) for key, value in (env or {}).items()}
    if max_retries:
        job_env.setdefault("PET_MAX_RESTARTS", str(max_retries))
    app = ddp(
        *[_verbatim(_verbatim(arg)) for arg in args],  # torchx, then torchrun, read macros in them
        m=f"shardemb.recipes.{recipe}",
        image=image,
        name=name,
        h=h,
        cpu=cpu or _CPUS_PER_RANK * ranks,
        gpu=gpu,
        memMB=memMB or _MEM_MB_PER_RANK * ranks,
        j=j,
        env=job_env,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        mounts=mounts,
    )
    role = app.roles[0]
    flag, torchrun = role.args
    assert (role.entrypoint, flag) == ("bash", "-c"), f"torchx's ddp changed: {role}"
    # exec, so that torchx waits for torchrun and not for a shell, which dies of a signal before it.
    set_threads = _SET_THREADS.replace("$", "$$").replace("RANKS", str(ranks))
    role.args = [flag, f"{set_threads}exec {torchrun}"]
    return app


def _ranks_per_node(j: str) -> int:
    ranks: int
    try:
        min_nodes, max_nodes, ranks, _ = parse_nnodes(j)
    except ValueError:
        raise UsageError(f"-j {j} must be nodes x ranks on each, such as 1x2 or 4x8") from None
    if not (1 <= min_nodes <= max_nodes and ranks >= 1):
        raise UsageError(
            f"-j {j} must start at least one rank on at least one node, such as 1x2 or 4x8"
        )
    return ranks


def _check_node(j: str, ranks: int, h: Optional[str], cpu: int, gpu: int, mem_mb: int) -> None:
    for option, value in {"cpu": cpu, "gpu": gpu, "memMB": mem_mb}.items():
        if value < 0:
            raise UsageError(f"--{option} must not be negative, got {value}")
        if value and h is not None:
            raise UsageError(f"-h {h} says what a node has; leave out --{option}, or -h")
    if h is not None and h not in specs.named_resources:
        raise UsageError(f"-h {h} is not a named resource of torchx; give --cpu, --gpu and --memMB")
    num_gpus = gpu if h is None else specs.named_resources[h].gpu
    if 0 < num_gpus < ranks:
        raise UsageError(
            f"-j {j} puts {ranks} ranks on a node of {num_gpus} GPUs; each rank needs its own"
        )


def _verbatim(text: str) -> str:
    """Keeps a `$` that the user typed from being read as a macro, `${app_id}` excepted."""
    return re.sub(r"\$(?!\{app_id\})", "$$", text)
