"""The torchx component: what it asks for, what reaches the ranks, what it refuses."""

import ast
import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from torchx import specs
from torchx.runner import get_runner
from torchx.specs.finder import ComponentValidationException, get_component

COMPONENTS = Path(__file__).parents[1] / "launch" / "components.py"
TRAIN = f"{COMPONENTS}:train"


def train(*args: str, **options: object) -> specs.AppDef:
    """Calls the component as torchx does, which executes the file."""
    return get_component(TRAIN).fn(*args, **options)


def role_of(*args: str, **options: object) -> specs.Role:
    (role,) = train(*args, **options).roles
    return role


def launched(
    role: specs.Role, tmp_path: Path, *, environ: dict[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """What torchrun gets, when a node runs the role's command: its arguments and environment."""
    spy = tmp_path / "torchrun"
    spy.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    spy.chmod(0o755)
    values = specs.macros.Values(
        img_root="", app_id="job7", replica_id="0", rank0_env="TORCHX_RANK0_HOST"
    )
    applied = values.apply(role)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"} | (environ or {}) | applied.env
    done = subprocess.run(
        [applied.entrypoint, *applied.args], env=env, capture_output=True, text=True, check=True
    )
    arguments, variables = json.loads(done.stdout)
    return arguments, variables


def torchx_run(tmp_path: Path, recipe: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs `recipe`, a script, on two local ranks through torchx."""
    package = tmp_path / "shardemb" / "recipes"
    package.mkdir(parents=True)
    for folder in (package.parent, package):  # else an installed shardemb comes first
        (folder / "__init__.py").touch()
    (package / "tried.py").write_text(recipe)
    return subprocess.run(
        [
            *(sys.executable, "-m", "torchx.cli.main"),
            *("run", "-s", "local_cwd", "-cfg", "log_dir=logs"),
            *(TRAIN, "--recipe", "tried", "-j", "1x2", "--", *args),
        ],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_replica_for_each_node_runs_the_recipe_under_torchrun() -> None:
    role = role_of("--steps", "100", recipe="next_item", j="3x4")
    assert (role.name, role.num_replicas, role.min_replicas) == ("next_item", 3, 3)
    command = shlex.split(role.args[1].partition("exec ")[2])
    assert command[0] == "torchrun"
    assert command[command.index("--nnodes") + 1] == "3"
    assert command[command.index("--nproc_per_node") + 1] == "4"
    assert command[-4:] == ["-m", "shardemb.recipes.next_item", "--steps", "100"]


def test_nodes_may_be_a_range() -> None:
    role = role_of(j="2:4x1")
    assert (role.min_replicas, role.num_replicas) == (2, 4)


def test_a_node_asks_for_cores_and_memory_by_the_number_of_its_ranks() -> None:
    assert role_of(j="2x4").resource == specs.Resource(cpu=8, gpu=0, memMB=32768)
    assert role_of(j="1x1").resource == specs.Resource(cpu=2, gpu=0, memMB=8192)
    given = role_of(j="1x4", cpu=3, gpu=4, memMB=999)
    assert given.resource == specs.Resource(cpu=3, gpu=4, memMB=999)
    assert role_of(j="1x1", h="gpu.small").resource == specs.named_resources["gpu.small"]


def test_ranks_get_the_settings_that_torch_and_glibc_need() -> None:
    env = role_of().env
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert env["MALLOC_MMAP_MAX_"] == "0"
    assert int(env["MALLOC_TRIM_THRESHOLD_"]) > 1 << 35
    assert env["PYTHONUNBUFFERED"] == "1"
    assert int(env["PET_SHUTDOWN_TIMEOUT"]) < 10  # torchx's patience with torchrun


def test_the_users_variables_win_and_the_users_dictionary_is_left_alone() -> None:
    given = {"MALLOC_MMAP_MAX_": "65536", "LOGLEVEL": "INFO", "PET_MAX_RESTARTS": "9"}
    env = role_of(env=given, max_retries=1).env
    assert {key: env[key] for key in given} == given
    assert len(given) == 3
    assert role_of().env["MALLOC_MMAP_MAX_"] == "0"


def test_retries_are_of_the_ranks_and_of_the_job() -> None:
    role = role_of(max_retries=2)
    assert (role.max_retries, role.env["PET_MAX_RESTARTS"]) == (2, "2")
    assert "PET_MAX_RESTARTS" not in role_of().env


@pytest.mark.parametrize(
    "typed",
    [
        "a b",
        "it's",
        'say "hi"',
        "$HOME",
        "$$",
        "${local_rank}",
        "${rank0_env}",
        "`ls`",
        "a\\b",
        "*",
        "a;b",
        "",
    ],
)
def test_arguments_and_variables_arrive_as_typed(tmp_path: Path, typed: str) -> None:
    elastic = pytest.importorskip("torch.distributed.elastic.utils.api")
    arguments, variables = launched(role_of("--out", typed, env={"TYPED": typed}), tmp_path)
    arguments = elastic.macros.substitute(arguments, "0")  # torchrun does, for each rank
    assert arguments[-2:] == ["--out", typed]
    assert variables["TYPED"] == typed


def test_the_number_of_the_job_is_the_one_macro(tmp_path: Path) -> None:
    arguments, variables = launched(
        role_of("--out", "runs/${app_id}", env={"RUN": "x-${app_id}"}), tmp_path
    )
    assert arguments[-1] == "runs/job7"
    assert variables["RUN"] == "x-job7"


def test_lines_are_marked_with_the_global_rank(tmp_path: Path) -> None:
    _, variables = launched(role_of(), tmp_path)
    assert variables["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] == "[${rank}]:"


@pytest.mark.skipif(sys.platform != "linux", reason="affinity")
def test_each_rank_gets_its_part_of_the_usable_cores_as_threads(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    for ranks in (1, 2, 64):
        role = role_of(j=f"1x{ranks}")
        role.args[1] = role.args[1].replace("/sys/fs/cgroup/cpu.max", str(tmp_path / "none"))
        _, variables = launched(role, tmp_path)
        assert variables["OMP_NUM_THREADS"] == str(max(1, cores // ranks))


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("99900000 100000", None)],
)
def test_a_containers_quota_bounds_the_threads(
    tmp_path: Path, cpu_max: str, cores: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(cpu_max + "\n")
    role = role_of(j="1x1")
    assert "/sys/fs/cgroup/cpu.max" in role.args[1]
    role.args[1] = role.args[1].replace("/sys/fs/cgroup/cpu.max", str(tmp_path / "cpu.max"))
    _, variables = launched(role, tmp_path)
    usable = int(
        subprocess.run(
            ["nproc"], env={"PATH": os.environ["PATH"]}, capture_output=True, check=True
        ).stdout
    )
    assert variables["OMP_NUM_THREADS"] == str(cores or usable)


def test_threads_that_the_user_or_the_node_sets_stay(tmp_path: Path) -> None:
    assert launched(role_of(env={"OMP_NUM_THREADS": "7"}), tmp_path)[1]["OMP_NUM_THREADS"] == "7"
    assert (
        launched(role_of(), tmp_path, environ={"OMP_NUM_THREADS": "5"})[1]["OMP_NUM_THREADS"] == "5"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"recipe": "my/train.py"},
            r"recipe 'my/train\.py' must be the name of a module in shardemb\.recipes",
        ),
        ({"recipe": "a; rm x"}, r"recipe 'a; rm x' must be the name"),
        ({"j": "two"}, r"-j two must be nodes x ranks on each, such as 1x2"),
        ({"j": "0x2"}, r"-j 0x2 must start at least one rank"),
        ({"j": "3:2x1"}, r"-j 3:2x1 must start at least one rank"),
        ({"cpu": -1}, r"--cpu must not be negative, got -1"),
        ({"max_retries": -1}, r"--max_retries must not be negative"),
        ({"gpu": 1, "j": "1x2"}, r"-j 1x2 puts 2 ranks on a node of 1 GPUs"),
        (
            {"h": "gpu.small", "memMB": 5},
            r"-h gpu\.small says what a node has; leave out --memMB, or -h",
        ),
        ({"h": "gpu.small", "j": "1x2"}, r"-j 1x2 puts 2 ranks on a node of 1 GPUs"),
        ({"h": "nowhere"}, r"-h nowhere is not a named resource of torchx"),
    ],
)
def test_what_cannot_be_launched_is_refused_by_name(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        train(**options)
    assert isinstance(
        refusal.value, ComponentValidationException
    )  # torchx prints the message of these


def test_slurm_is_asked_for_the_memory_and_exports_the_settings() -> None:
    with get_runner() as runner:
        dry_run = runner.dryrun_component(
            TRAIN, ["-j", "2x2", "--", "--out", "${app_id} $x"], "slurm", cfg={}
        )
    script = str(dry_run)
    assert script.count("--cpus-per-task=4 --mem=16384") == 2
    assert "MALLOC_MMAP_MAX_=0" in script
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script
    assert '"$SLURM_JOB_ID"' in script.partition("shardemb.recipes.dlrm")[2]


def test_every_option_is_explained_in_the_help() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd", TRAIN, "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Runs a recipe of shardemb" in shown
    for option in (
        "recipe",
        "cpu",
        "gpu",
        "memMB",
        "name",
        "image",
        "env",
        "max_retries",
        "rdzv_port",
        "mounts",
    ):
        explanation = (
            shown.partition(f"  --{option} ")[2].partition("(default")[0].split(maxsplit=1)
        )
        assert len(explanation) == 2, option  # the type, and words


def test_the_file_imports_only_torchx_and_the_standard_library() -> None:
    for path in COMPONENTS.parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, (
                    f"{path}: torchx executes the file, which breaks relative imports"
                )
                names = [node.module or ""]
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                assert top == "torchx" or top in sys.stdlib_module_names, f"{path} imports {name}"
                assert name != "__future__", f"{path}: torchx cannot read postponed annotations"


@pytest.mark.skipif(
    "shardemb" not in entry_points(group="torchx.components").names,
    reason="shardemb is not installed",
)
def test_once_installed_the_component_stands_beside_torchxs_own(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "torchx.cli.main", "builtins"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in ("shardemb.train", "dist.ddp", "utils.echo"):
        assert f" {name}\n" in shown


@pytest.mark.distributed
def test_a_local_run_starts_every_rank_and_keeps_its_output(tmp_path: Path) -> None:
    recipe = "import os, sys; print('rank', os.environ['RANK'], sys.argv[1:])"
    done = torchx_run(tmp_path, recipe, "--out", "a $b $$ c")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"[{rank}]:rank {rank} ['--out', 'a $b $$ c']" in done.stderr
        (log,) = tmp_path.glob(f"logs/**/attempt_0/{rank}/stdout.log")
        assert log.read_text() == f"rank {rank} ['--out', 'a $b $$ c']\n"


@pytest.mark.distributed
def test_a_rank_that_fails_fails_the_run_and_says_why(tmp_path: Path) -> None:
    recipe = "import os, sys; os.environ['RANK'] == '1' and sys.exit('rank 1 has had enough')"
    done = torchx_run(tmp_path, recipe)
    assert done.returncode == 1
    assert "[1]:rank 1 has had enough" in done.stderr
