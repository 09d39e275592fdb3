"""The doctor: what it accepts, what it says to type, and that nothing it tries can end it."""

import ast
import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shardemb import doctor
from shardemb.cores import threads_per_rank
from shardemb.doctor import Finding, Probe, Torch
from shardemb.doctor.versions import NEEDS, PYTHON, TORCH, install_command
from shardemb.huge_pages import huge_page_bytes
from shardemb.native.library import library

ROOT = Path(__file__).parents[1]
OTHERS = {
    "shardemb": "0.1.0",
    "numpy": "2.4.6",
    "tensordict": "0.15.3",
    "torchmetrics": "1.0.3",
    "tqdm": "4.70.1",
    "pyre-extensions": "0.0.32",
    "torchx": "0.7.0",
    "tyro": "1.0.16",
}
CPU = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", **OTHERS}
CUDA = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", **OTHERS}
BUILDS = [(CPU, False), (CUDA, True)]

SEGFAULT = {"torch/__init__.py": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"}
RAISE = {"torch/__init__.py": "raise OSError('libtorch.so: no such file')"}
REFUSE = {
    "sitecustomize.py": """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError("torch is refused")
sys.meta_path.insert(0, Refuse())
"""
}


def write(folder: Path, files: dict[str, str]) -> str:
    """Writes modules; returns a PYTHONPATH that puts them first."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def run_doctor(**environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardemb.doctor"],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


def without(versions: dict[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in names}


def not_ok(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state != "ok"]


def test_this_environment_fits() -> None:
    done = run_doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 problems" in done.stdout
    for subject in ("import torch", "import fbgemm_gpu", "import torchrec", "gloo"):
        assert f"ok       {subject:<17}  works" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (SEGFAULT, "crashes with SIGSEGV"),
        (RAISE, "fails: OSError: libtorch.so: no such file"),
        (REFUSE, "fails: ImportError: torch is refused"),
    ],
    ids=["segfault", "raise", "refuse"],
)
def test_a_torch_that_cannot_be_imported_is_a_finding(
    tmp_path: Path, files: dict[str, str], says: str
) -> None:
    done = run_doctor(PYTHONPATH=write(tmp_path, files))
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"problem  import torch       {says}" in done.stdout
    assert "-> pip install --force-reinstall --no-deps torch==" in done.stdout
    assert "note     import torchrec    not tried, needs torch" in done.stdout
    assert "ok       memory" in done.stdout  # the rest of the report comes
    assert done.stderr == ""


def test_a_library_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"torch/__init__.py": "import time; time.sleep(600)"}
    monkeypatch.setenv("PYTHONPATH", write(tmp_path, slow))
    assert doctor.probe("_use_torch", timeout_s=2).error == "hangs: nothing after 2 s"


def test_versions_that_are_tested_together_are_ok() -> None:
    for versions, cuda in BUILDS:
        assert not_ok(doctor.check_versions(versions, cuda=cuda, num_gpus=8 * cuda)) == []
    older = CPU | {"torch": "2.11.0+cpu", "torchrec": "1.6.0", "fbgemm-gpu-cpu": "1.6.0"}
    assert not_ok(doctor.check_versions(older)) == []


@pytest.mark.parametrize(
    ("versions", "cuda", "expected"),
    [
        (
            CPU | {"torchrec": "1.6.0"},
            False,
            Finding(
                "torchrec",
                "problem",
                "1.6.0: must be 1.8 to go with torch 2.13.0+cpu",
                "pip install --no-deps torchrec==1.8.0",
            ),
        ),
        (
            CPU | {"fbgemm-gpu-cpu": "1.9.0"},
            False,
            Finding(
                "fbgemm-gpu-cpu",
                "problem",
                "1.9.0: must be 1.8 to go with torch 2.13.0+cpu",
                "pip uninstall -y fbgemm-gpu-cpu && pip install fbgemm-gpu-cpu==1.8.0",
            ),
        ),
        (
            CPU | {"fbgemm-gpu": "1.8.0"},
            False,
            Finding(
                "fbgemm",
                "problem",
                "fbgemm-gpu and fbgemm-gpu-cpu fill the same folder and break each other",
                "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install fbgemm-gpu-cpu==1.8.0",
            ),
        ),
        (
            CUDA | {"torch": "2.13.0+cpu"},
            False,
            Finding(
                "fbgemm-gpu",
                "problem",
                "1.8.0: needs a CUDA build of torch",
                "pip uninstall -y fbgemm-gpu && pip install fbgemm-gpu-cpu==1.8.0",
            ),
        ),
        (
            CPU | {"torch": "2.13.0"},
            True,
            Finding(
                "fbgemm-gpu-cpu",
                "problem",
                "1.8.0: has no kernels for GPUs, torch is a CUDA build",
                "pip uninstall -y fbgemm-gpu-cpu && pip install fbgemm-gpu==1.8.0",
            ),
        ),
        (
            without(CUDA, "torchrec"),
            True,
            Finding("torchrec", "problem", "not installed", "pip install torchrec==1.8.0"),
        ),
        (
            without(CUDA, "fbgemm-gpu"),
            True,
            Finding("fbgemm-gpu", "problem", "not installed", "pip install fbgemm-gpu==1.8.0"),
        ),
        (
            CPU | {"torch": "2.12.1+cpu"},
            False,
            Finding(
                "torch",
                "note",
                "2.12.1+cpu: not tested, 2.13 and 2.11 are",
                "pip install torch==2.13.0",
            ),
        ),
        (
            without(CPU, "tqdm"),
            False,
            Finding("tqdm", "problem", "not installed", 'pip install "tqdm>=4.67,<5"'),
        ),
        (
            CPU | {"torchx": "0.8.0"},
            False,
            Finding("torchx", "problem", "0.8.0: must be ==0.7.0", 'pip install "torchx==0.7.0"'),
        ),
        (
            CPU | {"torchmetrics": "1.0.4"},
            False,
            Finding(
                "torchmetrics",
                "problem",
                "1.0.4: must be ==1.0.3",
                'pip install "torchmetrics==1.0.3"',
            ),
        ),
    ],
    ids=lambda value: value.subject if isinstance(value, Finding) else "",
)
def test_what_does_not_fit_is_named_with_what_to_type(
    versions: dict[str, str], cuda: bool, expected: Finding
) -> None:
    assert not_ok(doctor.check_versions(versions, cuda=cuda, num_gpus=int(cuda))) == [expected]


def test_the_cpu_build_of_fbgemm_beside_a_cuda_torch_is_fine_where_there_is_no_gpu() -> None:
    (found,) = not_ok(doctor.check_versions(CPU | {"torch": "2.13.0"}, cuda=True, num_gpus=0))
    assert (found.subject, found.state) == ("fbgemm-gpu-cpu", "note")


def test_nothing_installed_is_a_problem_for_each() -> None:
    found = not_ok(doctor.check_versions({}))
    assert [finding.subject for finding in found] == [
        *("shardemb", "torch", "torchrec", "fbgemm-gpu-cpu"),
        *without(OTHERS, "shardemb"),
    ]
    assert all(finding.remedy for finding in found)


def test_what_the_doctor_asks_for_is_what_the_package_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {f"{name}{need}" for name, need in NEEDS.items()}
    assert {TORCH, *needs} == set(project["dependencies"])
    major, minor = PYTHON
    assert project["requires-python"] == f">={major}.{minor},<{major}.{minor + 1}"
    extras = project["optional-dependencies"]
    for versions, cuda, wanted in ((CUDA, True, extras["cuda"]), (CPU, False, extras["cpu"])):
        for need in wanted:
            name = need.partition("=")[0]
            assert install_command(name, versions, cuda=cuda).endswith(f" {need}")


def test_a_library_that_is_installed_and_does_not_load_is_a_problem() -> None:
    broken = Probe(error="fails: ImportError: undefined symbol")
    probes = {
        "import torch": Probe(answer="{}"),
        "import fbgemm_gpu": broken,
        "import torchrec": Probe(error="fails: ModuleNotFoundError: No module named 'torchrec'"),
    }
    torch, fbgemm = doctor.check_imports(probes, without(CPU, "torchrec"), cuda=False)
    assert (torch.state, fbgemm.state) == ("ok", "problem")
    assert fbgemm.text == broken.error
    assert fbgemm.remedy == "pip install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0"


def test_gpus_are_listed_with_their_memory() -> None:
    torch = Torch(cuda="13.0", simd="AVX512")
    probes = {
        "cuda": Probe(answer='[["H200", 150000000000], ["H200", 150000000000]]'),
        "gloo": Probe(answer="works"),
        "nccl": Probe(error="fails: ncclSystemError"),
    }
    cpu, first, second, gloo, nccl = doctor.check_devices(torch, probes)
    assert (cpu.state, cpu.text.rpartition(", ")[2]) == ("ok", "AVX512")
    assert (first.subject, second.subject) == ("cuda:0", "cuda:1")
    assert first.text == "H200, 140 GiB"
    assert (gloo.state, nccl.state) == ("ok", "problem")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_whether_freed_memory_is_kept_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    found = doctor.check_allocator(doctor.probe("_use_allocator", timeout_s=60))
    assert found.state == "ok"
    assert found.text == f"glibc {platform.libc_ver()[1]}, keeps freed memory"
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "9")
    found = doctor.check_allocator(doctor.probe("_use_allocator", timeout_s=60))
    assert (found.state, found.remedy[:22]) == ("note", "unset MALLOC_MMAP_MAX_")
    assert ", gives freed memory back, as MALLOC_MMAP_MAX_ is set: large" in found.text
    for name, value in {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}.items():
        monkeypatch.setenv(name, value)
    found = doctor.check_allocator(doctor.probe("_use_allocator", timeout_s=60))
    assert found.state == "ok"
    assert found.text.endswith("as MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_ are set")


def test_huge_pages_that_are_off_or_not_to_be_had_are_noted() -> None:
    none, some = Probe(answer="0"), Probe(answer=str(2 << 20))
    off = doctor.check_huge_pages("always madvise [never]", none)
    assert (off.state, off.remedy[:12]) == ("note", "echo madvise")
    assert doctor.check_huge_pages("always [madvise] never", some) == Finding(
        "huge pages", "ok", "madvise, tables lie on them"
    )
    scattered = doctor.check_huge_pages("[always] madvise never", none)
    assert (scattered.state, scattered.text[:30]) == ("note", "always, but there was none to ")
    assert doctor.check_huge_pages("", none).state == "ok"


@pytest.mark.skipif(huge_page_bytes() == 0, reason="no transparent huge pages")
def test_huge_pages_are_tried() -> None:
    assert int(doctor.probe("_use_huge_pages", timeout_s=60).answer) >= huge_page_bytes()


def test_threads_that_wait_for_each_other_on_too_few_cores_are_noted() -> None:
    free = doctor.check_threads({}, 8)
    assert free.state == "ok"
    assert free.text.startswith(f"{threads_per_rank(1)} for 1 rank, {threads_per_rank(2)} each for")
    states = {
        given: doctor.check_threads({"OMP_NUM_THREADS": given}, 8).state
        for given in ("1", "4", "5", "100")
    }
    assert states == {"1": "ok", "4": "ok", "5": "note", "100": "note"}
    patient = {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "passive"}
    assert doctor.check_threads(patient, 8).state == "ok"


def test_kernels_that_are_missing_are_noted_with_what_to_type() -> None:
    compiled = doctor.check_native(Probe(answer='{"level": 3}'))
    assert (compiled.state, compiled.text) == ("ok", "compiled, for AVX2")
    none = doctor.check_native(Probe(answer='{"missing": "no kernels; have a compiler"}'))
    assert (none.state, none.text) == ("note", "none: no kernels")
    assert none.remedy.startswith("python setup.py build_ext --inplace  # with gcc")
    crashed = doctor.check_native(Probe(error="crashes with SIGILL"))
    assert (crashed.state, crashed.text) == ("note", "none: crashes with SIGILL")


def test_the_kernels_that_are_found_are_those_that_load() -> None:
    tried = doctor.probe("_use_native", timeout_s=120)
    found = doctor.check_native(tried)
    assert (found.state == "ok") == (library() is not None), found
    assert tried.error == ""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_whether_ranks_can_share_memory_is_tried() -> None:
    assert doctor.probe("_use_shared_memory", timeout_s=60) == Probe(answer="works")
    refused = Probe(error="fails: PermissionError: '/proc/7/fd/3'")
    assert doctor.check_exchange(Probe(answer="works"), compiled=True).state == "ok"
    assert "gloo" in doctor.check_exchange(Probe(answer="works"), compiled=False).text
    assert doctor.check_exchange(refused, compiled=True).remedy.startswith(
        "sudo mount -o remount,hidepid=0 /proc"
    )
    assert doctor.check_exchange(Probe(error="fails: OSError"), compiled=True).remedy.startswith(
        "docker run"
    )


def test_a_torchrun_of_another_environment_is_noted() -> None:
    here = Path(sys.executable).parent
    assert doctor.check_launcher(str(here / "torchrun")).state == "ok"
    for other in ("/elsewhere/bin/torchrun", None):
        found = doctor.check_launcher(other)
        assert (found.state, found.remedy) == ("note", f"export PATH={here}:$PATH")


def test_the_report_puts_the_remedy_under_its_finding_and_counts() -> None:
    findings = [Finding("a", "ok", "fine"), Finding("long", "problem", "off", "pip install a")]
    assert doctor.report(findings).splitlines() == [
        "ok       a     fine",
        "problem  long  off",
        "               -> pip install a",
        "",
        "1 problem, 0 notes",
    ]


def test_another_python_is_a_problem() -> None:
    states = [doctor.check_python((3, minor, 0)).state for minor in (10, 11, 12)]
    assert states == ["problem", "ok", "problem"]


def test_the_doctor_imports_only_the_standard_library_until_it_tries_a_library() -> None:
    files = Path(doctor.__file__).parent.glob("*.py")
    for node in [node for path in files for node in ast.parse(path.read_text()).body]:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            plain = {f"shardemb.{name}" for name in ("text", "allocator", "cores", "huge_pages")}
            ours = name in plain or name.startswith("shardemb.doctor")
            assert ours or name.partition(".")[0] in sys.stdlib_module_names
