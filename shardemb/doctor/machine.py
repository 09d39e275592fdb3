"""Cores, GPUs, kernels and the launcher. Changes none of it."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from shardemb.cores import threads_per_rank, usable_cores
from shardemb.doctor.finding import Finding
from shardemb.doctor.probes import Probe, Torch
from shardemb.doctor.versions import TORCH, install_command
from shardemb.text import format_bytes

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_LEVELS = {4: "AVX-512", 3: "AVX2", 1: "any machine of this kind"}


def check_devices(torch: Torch | None, probes: Mapping[str, Probe]) -> list[Finding]:
    """The cores, the GPUs, and the backends through which ranks talk."""
    cores = usable_cores()
    text = f"{cores} of {os.cpu_count()} cores may be used"
    if torch is None:
        return [Finding("cpu", "ok", text)]
    findings = [Finding("cpu", "ok", f"{text}, {torch.simd}")]
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


def check_threads(environ: Mapping[str, str], cores: int) -> Finding:
    """How many threads each rank of a node runs."""
    given = environ.get("OMP_NUM_THREADS", "")
    if not given.isdigit():
        alone, paired = (threads_per_rank(num_ranks) for num_ranks in (1, 2))
        text = f"{alone} for 1 rank, {paired} each for 2, and so on: the cores by the ranks"
        return Finding("threads", "ok", text)
    text = f"OMP_NUM_THREADS={given} for each rank, however many there are"
    if int(given) * 2 <= cores or int(given) == 1 or "OMP_WAIT_POLICY" in environ:
        return Finding("threads", "ok", text)
    text += f": 2 ranks share {cores} cores, and their threads wait by spinning"
    # both are read when OpenMP is loaded: a running process cannot set them
    remedy = "unset OMP_NUM_THREADS, or export OMP_WAIT_POLICY=passive"
    return Finding("threads", "note", text, remedy)


def check_native(tried: Probe) -> Finding:
    """Whether there are compiled kernels for this machine."""
    answer = json.loads(tried.answer or "{}")
    if level := answer.get("level"):
        return Finding("kernels", "ok", f"compiled, for {_LEVELS[level]}")
    build = "pip install --force-reinstall --no-deps shardemb"
    if (Path(__file__).parents[2] / "setup.py").exists():
        build = "python setup.py build_ext --inplace"
    why = answer.get("missing", tried.error).partition(";")[0]
    return Finding("kernels", "note", f"none: {why}", f"{build}  # with gcc or another C compiler")


def check_launcher(torchrun: str | None) -> Finding:
    """Whether the torchrun that torchx starts, the first on PATH, belongs to this Python."""
    here = Path(sys.executable).parent
    if torchrun is not None and Path(torchrun).parent == here:
        return Finding("torchrun", "ok", torchrun)
    text = f"{torchrun} is of another environment" if torchrun else "not on PATH"
    remedy = f"export PATH={here}:$PATH"
    return Finding("torchrun", "note", f"{text}: torchx starts the first on PATH", remedy)
