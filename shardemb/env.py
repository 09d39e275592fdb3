"""Who am I: rank, device and process group. The only reader of `os.environ` but the doctor."""

import atexit
import functools
import logging
import os
import sys
import warnings
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from shardemb.allocator import keep_freed_memory
from shardemb.cores import threads_per_rank, torchs_own_threads
from shardemb.errors import RunError

_SET_BY_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Env:
    """One process among many.

    Build it by hand to plan for a machine that is not here: `Env(rank=0, world_size=64,
    num_nodes=8, ...)`.

    Attributes:
        rank: Number of this process among all, 0 to world_size - 1.
        local_rank: Number of this process on its node.
        world_size: Number of processes.
        num_nodes: Number of nodes, each with the same number of processes.
        device: Where this process computes.
        run_id: The launcher's name for the job, the same when it starts ranks again; None if
            there is none.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    num_nodes: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - it is immutable
    run_id: str | None = None
    _of_this_run: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("rank", "local_rank", "world_size", "num_nodes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        if not isinstance(self.device, torch.device):
            raise ValueError(
                f"device must be a torch.device, such as torch.device('cpu'), got {self.device!r}"
            )
        if self.world_size < 1 or self.num_nodes < 1 or self.world_size % self.num_nodes:
            raise ValueError(
                "world_size must be a positive multiple of num_nodes, got "
                f"world_size={self.world_size} and num_nodes={self.num_nodes}; give every node "
                "the same number of ranks"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in 0..{self.world_size - 1}, got {self.rank}")

    @property
    def local_world_size(self) -> int:
        """Number of processes on each node."""
        return self.world_size // self.num_nodes

    @property
    def is_live(self) -> bool:
        """Whether `init_distributed` made it, and its process group is there to ask other ranks."""
        return (
            self._of_this_run and dist.is_initialized() and dist.get_world_size() == self.world_size
        )

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes the files that all share."""
        return self.rank == 0


def init_distributed(*, device: str | None = None, timeout_s: float = 1800.0) -> Env:
    """Joins the process group that torchrun or torchx started, or starts one of a single rank.

    CPU tensors go through gloo; on CUDA, CUDA tensors go through NCCL. On CPU what a sharded model
    exchanges has a group of its own, `shardemb.exchange`: memory that ranks of one host share. A
    process group that is there already is kept. Hides the notices by which torch deprecates what
    TorchRec calls.

    On CPU it also changes two settings of the whole process, where the user has not chosen them:
    glibc keeps freed memory instead of giving it back at every step (`MALLOC_MMAP_MAX_`,
    `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES` and a preloaded allocator
    are choices), and torch takes the cores of the node divided by its ranks as its number of
    threads (`OMP_NUM_THREADS`, `MKL_NUM_THREADS` and an earlier `torch.set_num_threads` are
    choices; the `OMP_NUM_THREADS=1` that torchrun sets by itself is none).

    Args:
        device: "cpu" or "cuda"; by default CUDA where there is a device, else the CPU.
        timeout_s: Seconds after which a collective that a rank does not join is an error.

    Returns:
        The environment of this process.

    Raises:
        RunError: The launcher's variables are incomplete or contradict a process group that is
            there, or CUDA is asked for where there is none.
        ValueError: `device` is neither "cpu" nor "cuda".

    Example:
        >>> init_distributed(device="cpu").world_size
        1
    """
    if device not in {None, "cpu", "cuda"}:
        raise ValueError(f"device must be 'cpu', 'cuda' or None, got {device!r}")
    rank, local_rank, world_size, local_world_size = _launched_as()
    chosen = _device(device, local_rank)
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    env = Env(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        num_nodes=world_size // local_world_size,
        device=chosen,
        run_id=None if run_id == "none" else run_id,
    )
    hide_notices()
    if env.device.type == "cpu":
        keep_freed_memory(os.environ)
        if torch.get_num_threads() in torchs_own_threads(os.environ):
            torch.set_num_threads(threads_per_rank(env.local_world_size))
    if not dist.is_initialized():
        _start(env, timedelta(seconds=timeout_s), launched="RANK" in os.environ)
    elif (dist.get_rank(), dist.get_world_size()) != (env.rank, env.world_size):
        raise RunError(
            f"a process group is there already, of rank {dist.get_rank()} of "
            f"{dist.get_world_size()}; the environment says rank {env.rank} of {env.world_size}"
        )
    object.__setattr__(env, "_of_this_run", True)  # frozen, and not for a caller to set
    return env


def _launched_as() -> tuple[int, int, int, int]:
    given = [name for name in _SET_BY_LAUNCHER if name in os.environ]
    if not given:
        return 0, 0, 1, 1
    missing = [name for name in _SET_BY_LAUNCHER if name not in os.environ]
    if missing:
        raise RunError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}; start with "
            "torchrun or torchx, which set all four, or unset them to run on one rank"
        )
    rank, local_rank, world_size, local_world_size = map(_integer, _SET_BY_LAUNCHER)
    if local_world_size < 1 or world_size % local_world_size:
        raise RunError(
            f"WORLD_SIZE={world_size} is not a multiple of LOCAL_WORLD_SIZE={local_world_size}; "
            "give every node the same number of ranks"
        )
    return rank, local_rank, world_size, local_world_size


def _integer(name: str) -> int:
    text = os.environ[name]
    try:
        return int(text)
    except ValueError:
        raise RunError(f"environment variable {name} must be an integer, got {text!r}") from None


def _device(asked: str | None, local_rank: int) -> torch.device:
    if asked == "cpu" or (asked is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= num_devices:
        raise RunError(
            f"local rank {local_rank} needs CUDA device {local_rank}, this node has "
            f"{num_devices}; start fewer ranks on a node, or use device='cpu'"
        )
    return torch.device("cuda", local_rank)


@functools.cache  # a change of the filters makes Python forget which warnings it has shown
def hide_notices() -> None:
    """Hides what torch and TorchRec say of their own affairs, which a user can do nothing about."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|torchrec)\.")
    # its gradients are right (tests/test_every_layout.py)
    warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    for name in ("torchrec.distributed.utils", "torchrec.distributed.comm"):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record is none of: replicas are not cached, and which groups a node has."""
    text = record.getMessage()
    known = ("caching params will be ignored", "TORCHREC_RESOLVED_POD_SIZE", "_group")
    return not any(part in text for part in known)


def _start(env: Env, timeout: timedelta, *, launched: bool) -> None:
    backend = "gloo" if env.device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if env.device.type == "cuda":
        torch.cuda.set_device(env.device)
    store = _store(env, timeout) if launched else dist.HashStore()
    dist.init_process_group(
        backend, store=store, rank=env.rank, world_size=env.world_size, timeout=timeout
    )
    atexit.register(_stop)


def _store(env: Env, timeout: timedelta) -> dist.Store:
    """Where ranks leave their addresses for each other.

    torchrun may keep one store for all attempts at a job, in which gloo finds addresses of ranks
    that are dead. On one node every attempt has a part of its own; agents of several nodes count
    attempts differently, and theirs make a new store where `shardemb.launch` says so.
    """
    found = next(dist.rendezvous("env://", timeout=timeout))
    store: dist.Store = found[0]
    store.set_timeout(timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None or env.num_nodes > 1:
        return store
    return dist.PrefixStore(f"attempt_{attempt}", store)


def leave_at_once(status: int) -> None:
    """Makes this process end, when it ends, without waiting for collectives that others never join.

    gloo waits for those that are under way until their timeout, and the other ranks with it.

    Args:
        status: The exit status.
    """
    atexit.register(_leave, status)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _stop() -> None:
    if hasattr(sys, "last_value"):  # an exception that nobody caught
        _leave(1)
    if dist.is_initialized():
        dist.destroy_process_group()
