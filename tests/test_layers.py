"""The direction of the imports, and that importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shardemb

ROOT = Path(__file__).parents[1]
# Lowest first; a file may import from its own layer and from those before it.
LAYERS = (
    {
        *(
            "shardemb",
            "text",
            "errors",
            "files",
            "env",
            "agree",
            "collectives",
            "optim.base",
            "optim.adam",
            "optim.configs",
            "optim",
            "distributions",
            "weight_files",
            "pretrained",
            "init",
            "machines",
            "control_groups",
            "host_memory",
            "cores",
            "allocator",
            "huge_pages",
            "native",
            "native.library",
            "native.kernels",
            "exchange",
            "exchange.calls",
            "exchange.group",
            "exchange.neighbours",
            "exchange.operators",
            "exchange.several_hosts",
            "exchange.shared",
            "exchange.tensors",
        ),
        "doctor",
        "doctor.__main__",
        "doctor.diagnosis",
        "doctor.finding",
        "doctor.machine",
        "doctor.memory",
        "doctor.probes",
        "doctor.versions",
    },
    {"config", "typed_json"},
    {
        "data",
        "data.lines",
        "data.clicks",
        "data.criteo",
        "data.click_log",
        "data.generated",
        "data.id_hash",
        "data.bag_values",
        "data.arrow",
        "data.bag_forms",
        "data.bags",
        "data.id_policies",
        "data.id_counts",
        "data.id_guard",
        "data.bag_padding",
        "data.guarded_forward",
        "data.batches",
        "data.profile",
        "data.profile_counter",
        "data.profile_file",
        "data.click_log_profile",
    },
    {
        "modules",
        "modules.initial_values",
        "modules.training",
        "modules.torchrec_optimizers",
        "modules.tables",
        "modules.embedding_bag",
        "modules.embedding",
        "modules.discovery",
        "modules.adapters",
        "modules.by_path",
        "modules.convertible",
        "modules.from_torch",
    },
    {
        "updates",
        "updates.formulas",
        "updates.rounding",
        "updates.lookups",
        "updates.shard_rows",
        "updates.slices",
        "updates.faults",
        "updates.kernel",
        "updates.fbgemm_kernel",
        "updates.native_kernel",
        "updates.native_lookups",
        "updates.weight_gradients",
        "updates.install",
        "updates.sharded",
        "updates.settings",
        "updates.replicated",
        "updates.row_optimizer",
        "updates.trained",
    },
    {
        "workload",
        "cluster",
        "kernel_choice",
        "layouts",
        "planning",
        "planning.geometry",
        "planning.kernel_rules",
        "planning.layout_rules",
        "constraints",
        "planning.contradictions",
        "planning.problem",
        "placement",
        "plans",
        "plans.cells",
        "plans.costs",
        "plans.diff",
        "plans.file",
        "plans.fit",
        "plans.html",
        "plans.shards",
        "plans.text",
        "plans.svg_bars",
        "traffic",
        "planning.candidates",
        "planning.estimates",
        "planning.sharders",
        "planning.search",
        "planning.planner",
        "planning.reasons",
        "planning.fits",
        "planning.probe",
        "plan",
        "planning.torchrec_plan",
    },
    {
        "rows",
        "outputs",
        "one_backward",
        "one_rank",
        "uneven_batches",
        "replicated_sequences",
        "shard",
        "optimizer",
        "optimizer_builder",
        "health",
    },
    {"checkpoint"},
    {"step_batches", "pipeline"},
    {"metrics", "models", "models.dlrm"},
    {
        "recipes",
        "recipes.run_folder",
        "recipes.config_file",
        "recipes.console",
        "recipes.progress",
        "recipes.dlrm",
    },
    {"commands", "commands.data", "commands.plan", "cli"},
    {"__main__"},
)
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "shardemb").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "shardemb"


def imported(path: Path) -> set[str]:
    """Modules of shardemb that a file imports, also inside functions, but not for types only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    plain: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            plain |= names
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    facade = {"shardemb"} | {f"shardemb.{name}" for name in shardemb.__all__}
    if facade & names - {"shardemb"} or "shardemb" in plain:  # it stands above the library
        assert module_of(path).startswith(("recipes.", "cli")), path
    found = {name.removeprefix("shardemb.") for name in names if name.startswith("shardemb.")}
    return {name for name in found if name in LAYER_OF}


def test_every_file_has_a_layer_and_imports_downwards_only() -> None:
    files = sorted((ROOT / "shardemb").rglob("*.py"))
    assert {module_of(path) for path in files} == set(LAYER_OF)
    upwards = [
        f"{module_of(path)} imports {name}"
        for path in files
        for name in imported(path)
        if LAYER_OF[name] > LAYER_OF[module_of(path)]
    ]
    assert upwards == []
    assert "data.lines" in imported(ROOT / "shardemb/data/click_log.py")


@pytest.mark.parametrize(
    "modules",
    [
        ("shardemb.layouts", "shardemb.optim", "shardemb.config", "shardemb.cli"),
        # a plan is described, read and compared where there is no torch
        ("shardemb.cluster", "shardemb.constraints", "shardemb.plans.file", "shardemb.plans.diff"),
        ("shardemb.planning.search",),
    ],
)
def test_importing_what_needs_no_torch_loads_none(modules: tuple[str, ...]) -> None:
    code = (
        f"import sys, {', '.join(modules)}; "
        "print(sorted({'torch', 'torchrec', 'fbgemm_gpu'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_env_reads_the_environment() -> None:
    readers = [
        module_of(path)
        for path in (ROOT / "shardemb").rglob("*.py")
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    ]
    assert set(readers) <= {"env", "doctor.diagnosis", "doctor.probes"}
