"""Libraries tried in processes of their own: none can end, or hold up, the one that asks."""

import ctypes
import json
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from shardemb.allocator import allocator_name, keep_freed_memory
from shardemb.doctor.finding import Finding
from shardemb.doctor.versions import TORCH, fbgemm_distribution, install_command
from shardemb.huge_pages import huge_mapping, huge_page_bytes


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a process that tried something says: an answer, or why there is none."""

    answer: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Torch:
    """What torch says of itself; `cuda` is the CUDA or ROCm that it is built for, "" for none."""

    cuda: str
    simd: str


def probe(function: str, *, timeout_s: float) -> Probe:
    """Calls a function of this file in a process of its own.

    Args:
        function: Its name. What it prints last is the answer.
        timeout_s: Seconds after which the process is ended.

    Returns:
        The answer, or the error in one line.
    """
    root = str(Path(__file__).parents[2])  # comes last on the path, so that it hides nothing
    call = f"from shardemb.doctor import probes; probes.{function}()"
    code = f"import sys; sys.path.append({root!r}); {call}"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Probe(error=f"hangs: nothing after {timeout_s:.0f} s")
    if process.returncode < 0:
        return Probe(error=f"crashes with {signal.Signals(-process.returncode).name}")
    if process.returncode > 0:
        last = (errors.strip() or f"exit status {process.returncode}").splitlines()[-1]
        return Probe(error=f"fails: {last.strip()}")
    return Probe(answer=printed.strip().rpartition("\n")[2])


def check_imports(
    probes: Mapping[str, Probe], versions: Mapping[str, str], *, cuda: bool
) -> list[Finding]:
    """Whether torch, FBGEMM and TorchRec load and work; left out where they are not installed."""
    torch = f"torch=={versions['torch']}" if "torch" in versions else TORCH
    modules = {
        "torch": (("torch",), f"pip install --force-reinstall --no-deps {torch}"),
        "fbgemm_gpu": (
            ("fbgemm-gpu", "fbgemm-gpu-cpu"),
            install_command(fbgemm_distribution(cuda=cuda), versions, cuda=cuda, again=True),
        ),
        "torchrec": (("torchrec",), install_command("torchrec", versions, cuda=cuda, again=True)),
    }
    findings = []
    for module, (distributions, remedy) in modules.items():
        subject = f"import {module}"
        installed = any(name in versions for name in distributions)
        tried = probes.get(subject)
        if tried is None:
            if installed:
                findings.append(Finding(subject, "note", "not tried, needs torch"))
        elif not tried.error:
            findings.append(Finding(subject, "ok", "works"))
        elif installed or not tried.error.endswith(f"No module named '{module}'"):
            findings.append(Finding(subject, "problem", tried.error, remedy))
    return findings


def _use_torch() -> None:
    import torch

    cuda = torch.version.cuda or torch.version.hip or ""
    simd = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"cuda": cuda, "simd": simd}))


def _use_cuda() -> None:
    import torch

    torch.ones(1, device="cuda")  # raises, and says why, where there is no GPU
    devices = []
    for i in range(torch.cuda.device_count()):
        torch.ones(1, device=f"cuda:{i}").add(1).item()
        properties = torch.cuda.get_device_properties(i)
        devices.append((properties.name, properties.total_memory))
    print(json.dumps(devices))


def _use_fbgemm() -> None:
    import torch

    import_module("fbgemm_gpu")  # loads the operators
    torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))


def _use_torchrec() -> None:
    import torch
    import torchrec

    ids, lengths = torch.tensor([1, 2]), torch.tensor([1, 1])
    torchrec.KeyedJaggedTensor.from_lengths_sync(["f"], ids, lengths).to_dict()


def _use_native() -> None:
    from shardemb.native.library import library, missing

    found = library()
    if found is None:
        print(json.dumps({"missing": missing()}))
        return
    (level,) = re.findall(r"_level(\d)", Path(found._name).name)
    print(json.dumps({"level": int(level)}))


def _use_allocator() -> None:
    left_alone = keep_freed_memory(os.environ)
    process = ctypes.CDLL(None)
    process.malloc.restype = ctypes.c_void_p
    process.free.argtypes = [ctypes.c_void_p]
    num_bytes = 64 << 20
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = process.malloc(ctypes.c_size_t(num_bytes))
        ctypes.memset(block, 1, num_bytes)
        process.free(block)
    num_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    keeps = num_faults < num_bytes // mmap.PAGESIZE // 10
    print(json.dumps([allocator_name(), keeps, left_alone]))


def _use_huge_pages() -> None:
    size = huge_page_bytes()
    memory = huge_mapping(4 * size)
    memory.write(b"1" * len(memory))
    rollup = Path("/proc/self/smaps_rollup").read_text()
    print(sum(int(kib) << 10 for kib in re.findall(r"AnonHugePages:\s+(\d+)", rollup)))


def _use_shared_memory() -> None:
    file = os.memfd_create("shardemb")
    os.ftruncate(file, mmap.PAGESIZE)
    write = f"open('/proc/{os.getpid()}/fd/{file}', 'r+b').write(b'works')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", write], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    print(os.pread(file, 5, 0).decode())


def _use_gloo() -> None:
    _use_backend("gloo", "cpu")


def _use_nccl() -> None:
    import torch

    if torch.cuda.is_available():
        _use_backend("nccl", "cuda:0")
    else:
        print("not tried, no GPU")


def _use_backend(name: str, device: str) -> None:
    import torch
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group(name, store=store, rank=0, world_size=1)
    dist.all_reduce(torch.ones(1, device=device))
    dist.destroy_process_group()
    print("works")
