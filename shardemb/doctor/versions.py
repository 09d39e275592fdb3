"""What is installed, whether it fits together, and what to type. Imports none of it."""

import re
import sys
from collections.abc import Mapping
from importlib import metadata

from shardemb.doctor.finding import Finding

# Release of torch: of TorchRec and FBGEMM. These are tested; FBGEMM's libraries load with no other.
_FITS = {"2.13": "1.8", "2.11": "1.6"}
_RELEASE = _FITS["2.13"]
PYTHON = (3, 11)
TORCH = "torch==2.13.0"
# As pyproject.toml has them; a test compares.
NEEDS = {
    "numpy": ">=2.0,<3",
    "tensordict": ">=0.15,<0.16",
    "torchmetrics": "==1.0.3",
    "tqdm": ">=4.67,<5",
    "pyre-extensions": "==0.0.32",
    "torchx": "==0.7.0",
    "tyro": ">=1.0,<2",
}


def installed_versions() -> dict[str, str]:
    """The versions of the distributions that matter here, of those that are installed."""
    versions = {}
    for name in ("shardemb", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", *NEEDS):
        try:
            versions[name] = metadata.version(name) or "unreadable"
        except metadata.PackageNotFoundError:
            continue
    return versions


def check_python(version: tuple[int, int, int]) -> Finding:
    """Python, as `(3, 11, 7)`."""
    text = f"{'.'.join(map(str, version))}, {sys.executable}"
    if version[:2] == PYTHON:
        return Finding("python", "ok", text)
    need = ".".join(map(str, PYTHON))
    remedy = f"python{need} -m venv .venv && . .venv/bin/activate"
    return Finding("python", "problem", f"{text}: must be {need}", remedy)


def check_versions(
    versions: Mapping[str, str], *, cuda: bool = False, num_gpus: int = 0
) -> list[Finding]:
    """Whether what is installed fits together.

    Args:
        versions: Of the distributions that are installed, by name.
        cuda: Whether torch is a CUDA build.
        num_gpus: How many GPUs torch sees.

    Returns:
        A finding for each distribution that shardemb needs.
    """
    findings = [
        _check_shardemb(versions.get("shardemb", "")),
        _check_torch(versions.get("torch", "")),
        _check_torchrec(versions, cuda=cuda),
        _check_fbgemm(versions, cuda=cuda, num_gpus=num_gpus),
    ]
    for name, need in NEEDS.items():
        version = versions.get(name)
        if version and _satisfies(version, need):
            findings.append(Finding(name, "ok", version))
        else:
            text = f"{version}: must be {need}" if version else "not installed"
            findings.append(Finding(name, "problem", text, f'pip install "{name}{need}"'))
    return findings


def _check_shardemb(version: str) -> Finding:
    if version:
        return Finding("shardemb", "ok", version)
    text = "not installed, runs from its folder: torchx does not know shardemb.train"
    return Finding("shardemb", "note", text, "pip install --no-deps -e .")


def _check_torch(version: str) -> Finding:
    if not version:
        text = "not installed; on Linux pip takes the CUDA build, of several GB, unless told where"
        return Finding("torch", "problem", text, f"pip install {TORCH}")
    if _minor(version) not in _FITS:
        text = f"{version}: not tested, {' and '.join(_FITS)} are"
        return Finding("torch", "note", text, f"pip install {TORCH}")
    return Finding("torch", "ok", version)


def _check_torchrec(versions: Mapping[str, str], *, cuda: bool) -> Finding:
    version = versions.get("torchrec", "")
    wrong = _wrong_release(version, versions) if version else "not installed"
    if wrong:
        install = install_command("torchrec", versions, cuda=cuda)
        return Finding("torchrec", "problem", wrong, install)
    return Finding("torchrec", "ok", version)


def _check_fbgemm(versions: Mapping[str, str], *, cuda: bool, num_gpus: int) -> Finding:
    installed = [name for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if name in versions]
    right = fbgemm_distribution(cuda=cuda)
    install = install_command(right, versions, cuda=cuda)
    if not installed:
        return Finding(right, "problem", "not installed", install)
    replace = f"pip uninstall -y {' '.join(installed)} && {install}"
    if len(installed) == 2:
        text = "fbgemm-gpu and fbgemm-gpu-cpu fill the same folder and break each other"
        return Finding("fbgemm", "problem", text, replace)
    (name,) = installed
    version = versions[name]
    if wrong := _wrong_release(version, versions):
        return Finding(name, "problem", wrong, replace)
    if name == right:
        return Finding(name, "ok", version)
    if cuda:  # fine where there is no GPU: pip's own choice of torch on Linux is a CUDA build
        text = f"{version}: has no kernels for GPUs, torch is a CUDA build"
        return Finding(name, "problem" if num_gpus else "note", text, replace)
    return Finding(name, "problem", f"{version}: needs a CUDA build of torch", replace)


def install_command(
    name: str, versions: Mapping[str, str], *, cuda: bool, again: bool = False
) -> str:
    """What to type for the release of a distribution that goes with torch."""
    # On CPU TorchRec is taken alone: its wheel requires fbgemm-gpu, the CUDA build.
    alone = " --no-deps" if again or (name == "torchrec" and not cuda) else ""
    command = f"pip install{' --force-reinstall' if again else ''}{alone}"
    return f"{command} {name}=={_release(versions)}.0"


def fbgemm_distribution(*, cuda: bool) -> str:
    """The distribution of FBGEMM that goes with a build of torch."""
    return "fbgemm-gpu" if cuda else "fbgemm-gpu-cpu"


def _release(versions: Mapping[str, str]) -> str:
    return _FITS.get(_minor(versions.get("torch", "")), _RELEASE)


def _wrong_release(version: str, versions: Mapping[str, str]) -> str:
    release = _release(versions)
    if _minor(version) == release:
        return ""
    return f"{version}: must be {release} to go with torch {versions.get('torch', '2.13')}"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _satisfies(version: str, need: str) -> bool:
    """Whether a version such as "1.0.3" is within bounds such as ">=0.7,<0.8"."""
    numbers = _numbers(version)
    for bound in filter(None, need.split(",")):
        limit = _numbers(bound.lstrip("<>="))
        met = {">": numbers >= limit, "<": numbers < limit, "=": numbers == limit}
        if not met[bound[0]]:
            return False
    return True


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]
