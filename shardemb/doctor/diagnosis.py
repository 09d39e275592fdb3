"""Everything that is looked at, in order. What each thing should be is in the files beside it."""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from shardemb.doctor.finding import Finding, report
from shardemb.doctor.machine import (
    HUGE_PAGES,
    NVIDIA_DRIVER,
    check_allocator,
    check_devices,
    check_huge_pages,
    check_launcher,
    check_memory,
)
from shardemb.doctor.probes import Torch, check_imports, probe
from shardemb.doctor.versions import check_python, check_versions, installed_versions

TIMEOUT_S = 120.0  # the first import from a network drive takes a minute


def diagnose(*, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Looks at this machine and this environment.

    Args:
        timeout_s: Seconds in which each library must be imported and used.

    Returns:
        What was found, from the bottom of the stack to the top.
    """
    versions = installed_versions()
    probes = {"import torch": probe("_use_torch", timeout_s=timeout_s)}
    torch = None
    if not probes["import torch"].error:
        torch = Torch(**json.loads(probes["import torch"].answer))
        functions = {
            "import fbgemm_gpu": "_use_fbgemm",
            "import torchrec": "_use_torchrec",
            "gloo": "_use_gloo",
        }
        if torch.cuda:
            functions |= {"cuda": "_use_cuda", "nccl": "_use_nccl"}
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: probe(name, timeout_s=timeout_s), functions.values())
            probes |= zip(functions, found, strict=True)
    cuda = bool(torch.cuda) if torch else _guess_cuda(versions)
    gpus = json.loads(probes["cuda"].answer or "[]") if "cuda" in probes else []
    return [
        check_python(sys.version_info[:3]),
        *check_versions(versions, cuda=cuda, num_gpus=len(gpus)),
        *check_imports(probes, versions, cuda=cuda),
        *check_devices(torch, probes),
        *check_memory(),
        check_allocator(os.environ),
        check_huge_pages(HUGE_PAGES.read_text() if HUGE_PAGES.exists() else ""),
        check_launcher(shutil.which("torchrun")),
    ]


def main() -> int:
    """Prints the report; returns the exit status, 1 where there is a problem."""
    findings = diagnose()
    print(report(findings))
    return int(any(finding.state == "problem" for finding in findings))


def _guess_cuda(versions: Mapping[str, str]) -> bool:
    """Whether torch is, or should be, a CUDA build, where it cannot be asked."""
    if "+" in versions.get("torch", ""):
        return "+cu" in versions["torch"]
    return "fbgemm-gpu" in versions or NVIDIA_DRIVER.exists()
