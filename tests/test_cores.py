"""Cores and threads: what limits them, and who chose them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardemb.cores import threads_per_rank, torchs_own_threads, usable_cores

linux = pytest.mark.skipif(sys.platform != "linux", reason="files of Linux")


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


@linux
def test_cores_are_what_affinity_and_the_quota_leave(tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == allowed
    write(tmp_path, "proc/self/cgroup", "0::/job/step")
    write(tmp_path, "sys/fs/cgroup/job/step/cpu.max", "max 100000")
    assert usable_cores(tmp_path) == allowed
    write(tmp_path, "sys/fs/cgroup/job/cpu.max", "190000 100000")
    assert usable_cores(tmp_path) == 1
    write(tmp_path, "sys/fs/cgroup/job/cpu.max", "50000 100000")
    assert usable_cores(tmp_path) == 1
    write(tmp_path, "sys/fs/cgroup/job/cpu.max", f"{100000 * (allowed + 1)} 100000")
    assert usable_cores(tmp_path) == allowed


@linux
def test_cores_are_what_a_quota_of_old_control_groups_leaves(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "3:cpuset:/a\n4:cpu,cpuacct:/b")
    write(tmp_path, "sys/fs/cgroup/cpu/b/cpu.cfs_quota_us", "-1")
    write(tmp_path, "sys/fs/cgroup/cpu/b/cpu.cfs_period_us", "100000")
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    write(tmp_path, "sys/fs/cgroup/cpu/b/cpu.cfs_quota_us", "100000")
    assert usable_cores(tmp_path) == 1


@linux
def test_two_hardware_threads_of_a_core_count_as_one_for_ranks(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    assert threads_per_rank(1, tmp_path) == len(cpus)
    for cpu in cpus:
        path = f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        write(tmp_path, path, f"{cpu - cpu % 2}-{cpu + 1 - cpu % 2}")
    pairs = len({cpu // 2 for cpu in cpus})
    assert threads_per_rank(1, tmp_path) == pairs
    assert threads_per_rank(2, tmp_path) == max(1, pairs // 2)
    assert usable_cores(tmp_path) == len(cpus)
    assert torchs_own_threads({}, tmp_path) == {len(cpus), pairs}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_of_threads_in_the_environment_is_a_choice(name: str) -> None:
    assert torchs_own_threads({})
    assert torchs_own_threads({name: "3"}) == set()


@linux
@pytest.mark.distributed
@pytest.mark.parametrize(("given", "own"), [({}, {1}), ({"OMP_NUM_THREADS": "1"}, set())])
def test_the_one_thread_that_torchrun_sets_is_no_choice(
    tmp_path: Path, given: dict[str, str], own: set[int]
) -> None:
    code = (
        "import os; from shardemb.cores import torchs_own_threads as own; "
        # in one piece, whatever the other rank prints
        "os.write(1, f\"{os.environ['OMP_NUM_THREADS']} {own(os.environ)}\\n\".encode())"
    )
    (tmp_path / "rank.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    unset = {name: text for name, text in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", tmp_path / "rank.py"],
        env=unset | given,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert sorted(done.stdout.splitlines()) == [f"1 {own}"] * 2, done.stderr
