"""Cores, GPUs, memory, and what the system is set to. Changes none of it."""

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from shardemb.doctor.finding import Finding
from shardemb.doctor.probes import Probe, Torch
from shardemb.doctor.versions import TORCH, install_command
from shardemb.text import format_bytes

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def check_devices(torch: Torch | None, probes: Mapping[str, Probe]) -> list[Finding]:
    """The cores, the GPUs, and the backends through which ranks talk."""
    cores = usable_cores()
    text = f"{cores} of {os.cpu_count()} cores may be used"
    if torch is None:
        return [Finding("cpu", "ok", text)]
    text += f", {torch.simd}, {torch.num_threads} threads in torch"
    if torch.num_threads > cores:
        findings = [Finding("cpu", "note", text, f"export OMP_NUM_THREADS={cores}")]
    else:
        findings = [Finding("cpu", "ok", text)]
    findings += _check_gpus(torch, probes.get("cuda", Probe()))
    backends = {
        "gloo": "export GLOO_SOCKET_IFNAME=lo  # or what leads to the other nodes: ip -br addr",
        "nccl": "export NCCL_DEBUG=INFO  # and again: NCCL says what it lacks",
    }
    for name, remedy in backends.items():
        tried = probes.get(name, Probe(answer="none, torch is a CPU build"))
        if tried.error:
            findings.append(Finding(name, "problem", tried.error, remedy))
        else:
            findings.append(Finding(name, "ok", tried.answer))
    return findings


def _check_gpus(torch: Torch, tried: Probe) -> list[Finding]:
    driver = NVIDIA_DRIVER.exists()
    if not torch.cuda:
        if not driver:
            return [Finding("cuda", "ok", "none, torch is a CPU build")]
        text = "there is an NVIDIA driver, but torch is a CPU build"
        fbgemm = install_command("fbgemm-gpu", {}, cuda=True)
        remedy = f"pip uninstall -y torch fbgemm-gpu-cpu && pip install {TORCH} && {fbgemm}"
        return [Finding("cuda", "note", text, remedy)]
    if tried.error:
        return [Finding("cuda", "problem" if driver else "note", tried.error, "nvidia-smi")]
    return [
        Finding(f"cuda:{i}", "ok", f"{name}, {format_bytes(num_bytes)}")
        for i, (name, num_bytes) in enumerate(json.loads(tried.answer))
    ]


def usable_cores() -> int:
    """The cores that this process may use: by affinity, and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, period = limit.read_text().split() if limit.exists() else ("max", "1")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def check_memory() -> list[Finding]:
    """Memory, and how much of it processes can share."""
    info, shared = Path("/proc/meminfo"), Path("/dev/shm")
    if not info.exists() or not shared.is_dir():
        return []
    num_kib = {key: int(n) for key, n in re.findall(r"(\w+):\s+(\d+)", info.read_text())}
    free, total = (format_bytes(num_kib[key] * 1024) for key in ("MemAvailable", "MemTotal"))
    text = f"{free} free of {total}"
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (allowed := limit.read_text().strip()) != "max":
        text += f", of which this container may use {format_bytes(int(allowed))}"
    memory = Finding("memory", "ok", text)
    num_bytes = shutil.disk_usage(shared).total
    text = f"{format_bytes(num_bytes)} in {shared}"
    if num_bytes >= 1 << 30:
        return [memory, Finding("shared memory", "ok", text)]
    text += ": ranks and loader workers exchange batches there"
    return [memory, Finding("shared memory", "note", text, "docker run --shm-size=8g ...")]


def check_allocator(environ: Mapping[str, str]) -> Finding:
    """Whether freed memory stays with the process, which makes large steps 2-3 times as fast."""
    if preloaded := re.search("jemalloc|tcmalloc|mimalloc", environ.get("LD_PRELOAD", "")):
        return Finding("malloc", "ok", preloaded[0])
    if platform.libc_ver()[0] != "glibc":
        return Finding("malloc", "ok", "not glibc's")
    missing = [name for name in ALLOCATOR if name not in environ]
    if not missing:
        text = ", ".join(f"{name}={environ[name]}" for name in ALLOCATOR)
        return Finding("malloc", "ok", text)
    text = (
        f"{' and '.join(missing)} not set: large steps are slower (torchx shardemb.train sets them)"
    )
    remedy = "export " + " ".join(f"{name}={ALLOCATOR[name]}" for name in missing)
    return Finding("malloc", "note", text, remedy)


def check_huge_pages(modes: str) -> Finding:
    """Transparent huge pages, from the kernel's list of modes such as `always [madvise] never`."""
    chosen = re.search(r"\[(\w+)\]", modes)
    if chosen is None:
        return Finding("huge pages", "ok", "no setting for them on this system")
    if chosen[1] != "never":
        return Finding("huge pages", "ok", chosen[1])
    text = "never: lookups in large tables are slower"
    return Finding("huge pages", "note", text, f"echo madvise | sudo tee {HUGE_PAGES}")


def check_launcher(torchrun: str | None) -> Finding:
    """Whether the torchrun that torchx starts, the first on PATH, belongs to this Python."""
    here = Path(sys.executable).parent
    if torchrun is not None and Path(torchrun).parent == here:
        return Finding("torchrun", "ok", torchrun)
    text = f"{torchrun} is of another environment" if torchrun else "not on PATH"
    remedy = f"export PATH={here}:$PATH"
    return Finding("torchrun", "note", f"{text}: torchx starts the first on PATH", remedy)
