"""Everything that is looked at, in order. What each thing should be is in the files beside it."""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from shardemb.cores import usable_cores
from shardemb.doctor.finding import Finding, report
from shardemb.doctor.machine import (
    NVIDIA_DRIVER,
    check_devices,
    check_launcher,
    check_native,
    check_threads,
)
from shardemb.doctor.memory import (
    HUGE_PAGES,
    check_allocator,
    check_exchange,
    check_huge_pages,
    check_memory,
)
from shardemb.doctor.probes import Probe, Torch, check_imports, probe
from shardemb.doctor.versions import check_python, check_versions, installed_versions

TIMEOUT_S = 120.0  # the first import from a network drive takes a minute
_OF_THE_SYSTEM = {
    "malloc": "_use_allocator",
    "huge pages": "_use_huge_pages",
    "exchange": "_use_shared_memory",
}
_WITH_TORCH = {
    "import fbgemm_gpu": "_use_fbgemm",
    "import torchrec": "_use_torchrec",
    "gloo": "_use_gloo",
    "kernels": "_use_native",
}


def diagnose(*, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Looks at this machine and this environment.

    Args:
        timeout_s: Seconds in which each library must be imported and used.

    Returns:
        What was found, from the bottom of the stack to the top.
    """
    versions = installed_versions()
    probes = _try({"import torch": "_use_torch", **_OF_THE_SYSTEM}, timeout_s)
    torch = None
    if not probes["import torch"].error:
        torch = Torch(**json.loads(probes["import torch"].answer))
        functions = dict(_WITH_TORCH)
        if torch.cuda:
            functions |= {"cuda": "_use_cuda", "nccl": "_use_nccl"}
        probes |= _try(functions, timeout_s)
    cuda = bool(torch.cuda) if torch else _guess_cuda(versions)
    gpus = json.loads(probes["cuda"].answer or "[]") if "cuda" in probes else []
    native = [check_native(probes["kernels"])] if torch else []
    return [
        check_python(sys.version_info[:3]),
        *check_versions(versions, cuda=cuda, num_gpus=len(gpus)),
        *check_imports(probes, versions, cuda=cuda),
        *check_devices(torch, probes),
        check_threads(os.environ, usable_cores()),
        *native,
        *check_memory(),
        check_allocator(probes["malloc"]),
        check_huge_pages(
            HUGE_PAGES.read_text() if HUGE_PAGES.exists() else "", probes["huge pages"]
        ),
        check_exchange(probes["exchange"], compiled=all(one.state == "ok" for one in native)),
        check_launcher(shutil.which("torchrun")),
    ]


def main() -> int:
    """Prints the report; returns the exit status, 1 where there is a problem."""
    findings = diagnose()
    print(report(findings))
    return int(any(finding.state == "problem" for finding in findings))


def _try(functions: Mapping[str, str], timeout_s: float) -> dict[str, Probe]:
    """What processes say that try something, by the names of the things; all at once."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: probe(name, timeout_s=timeout_s), functions.values())
        return dict(zip(functions, found, strict=True))


def _guess_cuda(versions: Mapping[str, str]) -> bool:
    """Whether torch is, or should be, a CUDA build, where it cannot be asked."""
    if "+" in versions.get("torch", ""):
        return "+cu" in versions["torch"]
    return "fbgemm-gpu" in versions or NVIDIA_DRIVER.exists()
