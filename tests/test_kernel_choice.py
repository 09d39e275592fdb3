"""Which kernel a plan has: by the device, by what is compiled, the same on all ranks, and shown."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shardemb as se
from shardemb import cli, layouts
from shardemb.native.library import missing
from shardemb.plans.diff import diff_plans
from shardemb.plans.file import read_plan
from tests.plans import ENV, NEEDS_NATIVE, TWO_NODES, every_layout, model, sgd_table, table

ROOT = Path(__file__).parents[1]
CUDA = se.Env(world_size=4, device=torch.device("cuda"))
TABLES = """
import dataclasses, shardemb as se
from shardemb import layouts
def tables(**fields):
    given = dict(name="a", num_embeddings=100, embedding_dim=8, feature_names=("a",)) | fields
    return se.EmbeddingBagCollection([se.TableConfig(**given)])
def tell(function):
    try:
        print(function().kernel)
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
where = {"a": layouts.row_wise()}
"""


def test_auto_is_native_on_cpu_where_it_is_compiled_and_else_fbgemm() -> None:
    here = "fbgemm" if missing() else "native"
    assert se.plan_sharding(model(), ENV).kernel == here
    assert se.plan_sharding(model(), TWO_NODES).kernel == here
    assert se.plan_sharding(model(), ENV, kernel="fbgemm").kernel == "fbgemm"
    assert se.plan_sharding(model(), CUDA).kernel == "fbgemm"
    assert se.plan_sharding(model(), se.Cluster.preset("h100")).kernel == "fbgemm"


@pytest.mark.parametrize("where", [CUDA, replace(TWO_NODES, device="cuda")])
def test_native_on_cuda_is_refused_with_the_way_out(where: Any) -> None:
    text = (
        "kernel='native': it is for ranks on the CPU, and these are on cuda; or use kernel='auto' "
        "or 'fbgemm'"
    )
    with pytest.raises(ValueError, match=text):
        se.plan_sharding(model(), where, kernel="native")


@pytest.mark.parametrize("kernel", ["turbo", None, ["native"], True])
def test_what_is_no_kernel_is_refused(kernel: Any) -> None:
    with pytest.raises(ValueError, match="kernel must be 'auto', 'native' or 'fbgemm', got "):
        se.plan_sharding(model(), ENV, kernel=kernel)


@NEEDS_NATIVE
def test_the_kernel_does_not_change_where_tables_lie() -> None:
    tables = [sgd_table(f"t{width}", embedding_dim=width) for width in (8, 16, 64, 128, 256)]
    one, two = (
        se.plan_sharding(se.EmbeddingBagCollection(tables), TWO_NODES, kernel=kernel)
        for kernel in ("native", "fbgemm")
    )
    assert one.tables == two.tables
    assert (one.kernel, two.kernel) == ("native", "fbgemm")


@NEEDS_NATIVE
def test_the_kernel_is_printed_drawn_and_told_apart() -> None:
    native, fbgemm = every_layout(kernel="native"), every_layout(kernel="fbgemm")
    told = "kernel native, shardemb's own; 1 data_parallel table by FBGEMM's dense one"
    assert str(native).splitlines()[2] == told
    assert f"<p>{told.replace(chr(39), '&#x27;')}</p>" in native.to_html()
    told = "kernel fbgemm, FBGEMM's; 1 data_parallel table by FBGEMM's dense one"
    assert str(fbgemm).splitlines()[2] == told
    one = se.EmbeddingBagCollection([table("a")])
    alone = se.plan_sharding(one, ENV, {"a": layouts.row_wise()}, kernel="native")
    assert str(alone).splitlines()[2] == "kernel native, shardemb's own"
    assert diff_plans(fbgemm, native).splitlines()[:2] == [
        "table   what    before     after",
        "(plan)  kernel  fbgemm ->  native",
    ]
    assert json.loads(native.to_json())["kernel"] == "native"


@NEEDS_NATIVE
def test_a_file_keeps_the_kernel_and_one_without_is_of_fbgemm(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    native = every_layout(kernel="native")
    native.save(path)
    assert read_plan(path) == native
    values = json.loads(path.read_text())
    assert values.pop("kernel") == "native"
    path.write_text(json.dumps(values))
    assert read_plan(path) == replace(native, kernel="fbgemm")
    for wrong in ("auto", 1, None, ["native"]):
        path.write_text(json.dumps(values | {"kernel": wrong}))
        with pytest.raises(ValueError, match="kernel must be one of native, fbgemm, got "):
            read_plan(path)


@NEEDS_NATIVE
def test_a_native_plan_does_not_fit_ranks_on_cuda(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = every_layout(kernel="native")
    plan.save(path)
    assert se.load_plan(path, model(), ENV) == plan
    for where in (replace(plan.cluster, device="cuda"), replace(ENV, device=torch.device("cuda"))):
        with pytest.raises(ValueError, match="does not fit") as caught:
            se.load_plan(path, model(), where)
        assert (
            "its kernel is 'native': it is for ranks on the CPU, and these are on cuda; or plan "
            "with kernel='auto' or 'fbgemm'"
        ) in str(caught.value)


@NEEDS_NATIVE
def test_the_command_takes_the_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    given = ["plan", "--num-embeddings", "2000", "--save", str(file)]
    for asked, made in (([], "native"), (["fbgemm"], "fbgemm"), (["native"], "native")):
        assert cli.main([*given, *(["--kernel", *asked] if asked else [])]) == 0
        assert read_plan(file).kernel == made
        assert f"\nkernel {made}, " in capsys.readouterr().out
    assert cli.main([*given, "--cluster", "h100", "--kernel", "native"]) == 1
    assert "kernel='native': it is for ranks on the CPU" in capsys.readouterr().err
    assert cli.main([*given[:3], "--plan", str(file), "--kernel", "native"]) == 0
    capsys.readouterr()
    assert cli.main([*given[:3], "--plan", str(file), "--kernel", "fbgemm"]) == 1
    assert (
        f"--kernel is 'fbgemm', and the plan in {file} is for kernel 'native'; leave out one"
    ) in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([*given, "--kernel", "turbo"])


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shardemb as it is where no compiler was."""
    folder = tmp_path_factory.mktemp("bare")
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "shardemb", folder / "shardemb", ignore=without)
    return folder


def python(folder: Path, code: str, **variables: str) -> "subprocess.Popen[str]":
    """Runs code after `TABLES`, with the shardemb of a folder."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", TABLES + textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(folder)} | variables,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(*processes: "subprocess.Popen[str]") -> list[list[str]]:
    """The lines of each, which must all end well."""
    lines = []
    for process in processes:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        lines.append(out.splitlines())
    return lines


NOT_COMPILED = "shardemb was installed without its compiled kernels; have a C compiler such as gcc"


def test_where_nothing_is_compiled_auto_is_fbgemm_and_native_is_refused(
    bare: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    replace(
        se.plan_sharding(
            se.EmbeddingBagCollection([table("a")]), ENV, {"a": layouts.row_wise()}, kernel="fbgemm"
        ),
        kernel="native",
    ).save(path)
    code = f"""
    env = se.Env(world_size=4, num_nodes=2)
    tell(lambda: se.plan_sharding(tables(), env))
    tell(lambda: se.plan_sharding(tables(), env, kernel="native"))
    tell(lambda: se.plan_sharding(tables(embedding_dim=6), env))
    mine = tables(feature_names=("a_id",), num_embeddings=1000, embedding_dim=16,
                  optimizer=se.optim.Adagrad(lr=0.1))
    tell(lambda: se.load_plan({str(path)!r}, mine, env))
    cluster = se.Cluster(name="c", num_nodes=2, ranks_per_node=2, memory_bytes=1 << 40,
                         memory_gb_per_s=1, intra_node_gb_per_s=1, inter_node_gb_per_s=1)
    tell(lambda: se.load_plan({str(path)!r}, mine, cluster))
    """
    ((auto, native, odd, loaded, elsewhere),) = said(python(bare, code))
    assert auto == "fbgemm"
    assert native.startswith(f"ValueError kernel='native': {NOT_COMPILED}")
    assert native.endswith("; or use kernel='auto' or 'fbgemm'")
    assert odd.startswith("ValueError table 'a': embedding_dim must be a positive multiple of 4")
    assert f"does not fit:   its kernel is 'native': {NOT_COMPILED}" in loaded
    assert elsewhere == "native"


@NEEDS_NATIVE
@pytest.mark.distributed
def test_ranks_of_which_one_lacks_the_native_kernel_agree_or_are_refused_together(
    bare: Path,
) -> None:
    code = """
    env = se.init_distributed(device="cpu")
    asked = ["native", "fbgemm"][env.rank]
    tell(lambda: se.plan_sharding(tables(), env, where))
    tell(lambda: se.plan_sharding(tables(), env, where, kernel="fbgemm"))
    tell(lambda: se.plan_sharding(tables(), env, where, kernel="native"))
    tell(lambda: se.plan_sharding(tables(), env, where, kernel=asked))
    model = tables()
    plan = dataclasses.replace(se.plan_sharding(model, env, where), kernel="native")
    tell(lambda: se.shard_modules(model, plan, env))
    tell(lambda: se.plan_sharding(tables(embedding_dim=6), env, where))
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    whole, lacking = said(
        *(
            python(folder, code, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=port, **common)
            for rank, folder in enumerate((ROOT, bare))
        )
    )
    assert whole[:2] == lacking[:2] == ["fbgemm", "fbgemm"]
    assert lacking[2].startswith(f"ValueError kernel='native': {NOT_COMPILED}")
    assert whole[2].startswith("OtherRankError rank 1 failed while looking at the memory and the k")
    assert f"kernel='native': {NOT_COMPILED}" in whole[2]
    different = "RunError rank 1 planned otherwise than rank 0, in the kernel; declare the same tab"
    assert [lines[3][: len(different)] for lines in (whole, lacking)] == [different] * 2
    assert lacking[4].startswith("ValueError the plan does not fit:   its kernel is 'native': sh")
    assert whole[4].startswith("OtherRankError rank 1 failed while sharding the model: ValueError")
    assert f"its kernel is 'native': {NOT_COMPILED}" in whole[4]
    odd = "table 'a': embedding_dim must be a positive multiple of 4 for FBGEMM's kernels, got 6"
    assert odd in whole[5]
    assert odd in lacking[5]
