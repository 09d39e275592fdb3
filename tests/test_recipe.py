"""The dlrm recipe as a user runs it: one rank here, several through torchx."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shardemb import cli
from shardemb.data.generated import write_click_log
from shardemb.env import Env
from shardemb.errors import RunError
from shardemb.plans.file import read_plan
from shardemb.recipes.dlrm import default_batch_size
from shardemb.recipes.run_folder import RunFolder, open_run

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared/data/criteo-small"
SMALL = ("--num-embeddings", "2000", "--log-every", "5", "--batch-size", "64")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_click_log(folder, num_train=2000, num_test=200)
    return folder


def shell(*command: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """Runs a command from the checkout, as a user whose environment is active."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | changed
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=300, check=False
    )


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return shell(sys.executable, "-m", "shardemb.cli", "train", *SMALL, *arguments)


def torchx(j: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd"]
    component = ["launch/components.py:train", "-j", j, "--", *SMALL]
    return shell(*command, *component, *arguments)


def progress(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def result(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return loaded


@pytest.mark.distributed
@pytest.mark.slow
def test_torchx_starts_ranks_on_one_node_and_on_two_with_one_result(
    log: Path, tmp_path: Path
) -> None:
    for j in ("1x2", "2x1"):
        out = tmp_path / j
        done = torchx(j, "--data", str(log), "--out", str(out), "--steps", "30")
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout + done.stderr
        assert "step 30/30" in said
        assert "row_wise" in said
        assert "held out: AUC" in said
        assert result(out)["world_size"] == 2
        assert read_plan(out / "plan.json").world_size == 2
        assert Path(result(out)["checkpoint"], "shardemb.json").is_file()
    done = train("--data", str(log), "--out", str(tmp_path / "1"), "--steps", "30")
    assert done.returncode == 0, done.stderr
    names = {"auc", "log_loss", "normalized_entropy", "samples_per_second", "world_size"}
    assert names <= set(result(tmp_path / "1"))
    for j in ("1x2", "2x1"):
        for (step, loss), (_, alone) in zip(
            progress(tmp_path / j), progress(tmp_path / "1"), strict=True
        ):
            assert loss == pytest.approx(alone, abs=1e-5), step
        assert result(tmp_path / j)["log_loss"] == pytest.approx(
            result(tmp_path / "1")["log_loss"], abs=1e-5
        )
    grown = tmp_path / "grown"
    assert train("--data", str(log), "--out", str(grown), "--steps", "20").returncode == 0
    done = torchx("1x2", "--out", str(grown), "--steps", "30", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(grown)["log_loss"] == pytest.approx(result(tmp_path / "1")["log_loss"], abs=1e-5)


@pytest.mark.distributed
def test_a_run_reports_the_health_of_its_tables_at_its_own_steps(log: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    done = train("--data", str(log), "--out", out, "--steps", "5", "--health-every", "2")
    assert done.returncode == 0, done.stderr
    reports = re.findall(r"^step (\d): gradient norm .* since step 0$", done.stdout, re.MULTILINE)
    assert reports == ["2", "4"]
    assert len(re.findall(r"^C26 +\d+ +\d+ .*%", done.stdout, re.MULTILINE)) == 2


@pytest.mark.distributed
def test_a_run_refuses_to_overwrite_and_resumes_to_where_an_uninterrupted_one_ends(
    log: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    every = ("--data", str(log), "--checkpoint-every", "10")
    assert train(*every, "--out", str(whole), "--steps", "30").returncode == 0
    assert train(*every, "--out", str(cut), "--steps", "20").returncode == 0
    before = {path: path.read_bytes() for path in cut.glob("*.*")}

    again = train(*every, "--out", str(cut), "--steps", "30")
    assert again.returncode == 1
    assert f"error: {cut} holds a run already (last checkpoint after step 20)" in again.stderr
    assert "To go on with it add --resume (make train ARGS=--resume);" in again.stderr
    assert {path: path.read_bytes() for path in cut.glob("*.*")} == before

    other = train("--out", str(cut), "--resume", "--steps", "30", "--sparse-lr", "0.5")
    assert other.returncode == 1
    assert "--sparse-lr is 0.5, the run in" in other.stderr
    assert "began with 0.02; resume it as it began" in other.stderr

    with open(cut / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 25, "loss": 9.0, "samples_per_second": 1.0}\n{"step": 29, "lo')
    resumed = train("--out", str(cut), "--resume", "--steps", "30")
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 20 of 30" in resumed.stdout
    expected = result(whole) | {"checkpoint": "", "samples_per_second": 0}
    assert result(cut) | {"checkpoint": "", "samples_per_second": 0} == expected
    assert [entry for entry in progress(cut) if entry[0] in {5, 20, 25, 30}] == [
        entry for entry in progress(whole) if entry[0] in {5, 20, 25, 30}
    ]
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["00000020", "00000030"]

    parts, clipped = tmp_path / "parts", tmp_path / "clipped"
    fewer = ("--num-micro-batches", "2", "--max-norm", "1000")  # which no step has
    assert train(*every, "--out", str(parts), "--steps", "20", *fewer).returncode == 0
    resumed = train("--out", str(parts), "--resume", "--steps", "30", "--num-micro-batches", "4")
    assert resumed.returncode == 0, resumed.stderr
    assert (
        train(*every, "--out", str(clipped), "--steps", "30", "--max-norm", "0.01").returncode == 0
    )
    losses = {folder: [loss for _, loss in progress(folder)] for folder in (whole, parts, clipped)}
    assert losses[parts] == pytest.approx(losses[whole], rel=1e-5)
    assert losses[clipped] != pytest.approx(losses[whole], rel=1e-3)
    refused = train("--out", str(tmp_path / "seven"), "--num-micro-batches", "7")
    assert "a batch of 64 samples does not divide by 7 micro-batches of 1 ranks" in refused.stderr

    nowhere = train("--out", str(tmp_path / "nowhere"), "--resume")
    assert nowhere.returncode == 1
    assert "there is no run to resume in" in nowhere.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_run_resumes_to_where_an_uninterrupted_one_ends(log: Path, tmp_path: Path) -> None:
    arguments = ("--data", str(log), "--checkpoint-every", "5", "--steps", "40")
    assert train(*arguments, "--out", str(tmp_path / "whole")).returncode == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "shardemb.cli", "train", *SMALL, *arguments, "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(out / "checkpoints" / "00000010")
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = train("--out", str(out), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    same = {"auc", "log_loss", "normalized_entropy", "steps"}
    whole = result(tmp_path / "whole")
    assert {name: result(out)[name] for name in same} == {name: whole[name] for name in same}


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_killed_under_torchx_starts_again_and_ends_where_it_would_have(
    log: Path, tmp_path: Path
) -> None:
    arguments = ("--data", str(log), "--checkpoint-every", "5", "--steps", "60")
    assert torchx("1x2", *arguments, "--out", str(tmp_path / "whole")).returncode == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd"]
    command += ["launch/components.py:train", "-j", "1x2", "--max_retries", "1", "--", *SMALL]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        [*command, *arguments, "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        wait_for(out / "checkpoints" / "00000010")
        os.kill(pid_of_rank(1, str(out)), signal.SIGKILL)
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "going on from" in said
    same = {"auc", "log_loss", "normalized_entropy", "steps"}
    whole = result(tmp_path / "whole")
    assert {name: result(out)[name] for name in same} == {name: whole[name] for name in same}
    assert [step for step, _ in progress(out)] == [step for step, _ in progress(tmp_path / "whole")]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.002)


def pid_of_rank(rank: int, argument: str) -> int:
    """The process of a rank, found by its environment and an argument of its command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            environ = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        if argument in words and f"RANK={rank}" in environ:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank} with {argument}")


def test_two_runs_in_one_folder_are_refused_and_an_interrupted_start_is_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    open_run(folder, "steps = 1\n", Env(), resume=False)
    with pytest.raises(RunError, match=r"another run writes to .*run; wait for it, or end its"):
        open_run(RunFolder(folder.path), "steps = 2\n", Env(), resume=False)
    assert (folder.path / "config.toml").read_text() == "steps = 1\n"
    del folder  # as its process would: the run was interrupted before its first step
    again = RunFolder(tmp_path / "run")
    open_run(again, "steps = 3\n", Env(run_id="job-1"), resume=False)
    assert again.is_of("job-1")
    assert not again.is_of("job-2")
    assert not again.is_of(None)
    again.log({"step": 1, "samples_per_second": 5.0})
    with pytest.raises(FileExistsError, match=r"holds a run already \(no checkpoint yet\)"):
        open_run(again, "steps = 3\n", Env(), resume=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="other exists and is not a run; give --out a new"):
        open_run(RunFolder(tmp_path / "other"), "", Env(), resume=False)


def test_a_run_keeps_its_data(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep("data.json", "one")
    folder.keep("data.json", "two")  # nothing was trained on the first
    folder.checkpoint_path(5).mkdir(parents=True)
    header = {"format": 2, "step": 5, "settings": {}}
    (folder.checkpoint_path(5) / "shardemb.json").write_text(json.dumps(header))
    folder.keep("data.json", "two")
    with pytest.raises(ValueError, match=r"began with other data than now, as .*data\.json tells"):
        folder.keep("data.json", "three")


@pytest.mark.distributed
def test_bad_data_is_refused_and_leaves_the_folder_free(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    missing = train("--data", str(tmp_path / "no"), "--out", str(out))
    assert missing.returncode == 1
    assert f"error: data path '{tmp_path / 'no'}' does not exist" in missing.stderr
    assert not out.exists()
    garbage = tmp_path / "garbage.txt"
    garbage.write_text("spam and eggs\n" * 5000)
    refused = train("--data", str(garbage), "--out", str(out))
    assert refused.returncode == 1
    assert "garbage.txt:1: 1 field instead of 40, and so on for 100 lines" in refused.stderr
    assert not out.exists()
    some = tmp_path / "some.txt"
    lines = (log / "train.txt").read_text().splitlines(keepends=True)
    some.write_text("".join([*lines[:3], "spam\n", *lines[3:]]))
    done = train("--data", str(some), "--out", str(out), "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert result(out)["malformed_lines"] == 1
    assert "some.txt:4: 1 field instead of 40 (skipped, 1 so far)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--kernel", "fbgemm", "--embedding-dim", "30"],
            "a positive multiple of 4 for FBGEMM",
        ),
        (["--config", "{tmp}/kernel.toml"], "kernel must be 'auto', 'native' or 'fbgemm', got 'x'"),
        (["--config", "{tmp}/a.toml"], "a.toml: unknown key 'stpes'; known are batch_size"),
        (["--config", "{tmp}/none.toml"], "none.toml"),
        (["--config", "{tmp}/kind.toml"], "kind.toml: steps must be int, got 'ten'"),
        (["--config", "{tmp}/list.toml"], "row_wise must be a list of str, got 'C3'"),
        (["--world-size", "0"], "world_size must be a positive multiple of num_nodes"),
    ],
)
def test_a_bad_config_is_refused_by_name(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("stpes = 10\n")
    (tmp_path / "kind.toml").write_text("steps = 'ten'\n")
    (tmp_path / "kernel.toml").write_text("kernel = 'x'\n")
    (tmp_path / "list.toml").write_text("row_wise = 'C3'\n")
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert cli.main(["plan", *given]) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--health-every", "-1"], "health_every must not be negative, got -1"),
        (["--num-micro-batches", "0"], "num_micro_batches must be at least 1, got 0"),
        (["--max-norm", "-1"], "max_norm must be a positive number, got -1.0"),
        (["--row-wise", "C27"], "row_wise names table 'C27'; the tables are C1 to C26"),
        (["--stpes", "5"], "Unrecognized options: --stpes"),
    ],
)
def test_a_bad_command_line_is_refused_by_name(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", *arguments])
    assert text in capsys.readouterr().err


def test_plan_prints_and_dumps_without_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text('num_embeddings = 800\nrow_wise = ["C1"]\n')
    assert (
        cli.main(["plan", "--world-size", "8", "--json", "--config", str(tmp_path / "a.toml")]) == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["tables"][0]["shards"]["num_rows"] == [100] * 8
    assert plan["tables"][2]["layout"] == "table_wise"


def test_the_command_says_what_it_can_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([]) == 2
    assert cli.main(["fly"]) == 2
    captured = capsys.readouterr()
    assert "there is no command 'fly'; there are train, plan, data, doctor" in captured.err
    out = tmp_path / "log"
    assert cli.main(["data", "generate", str(out), "--rows", "50", "--test-rows", "20"]) == 0
    assert "50 rows to train on, 20 held out" in capsys.readouterr().out
    assert (out / "train.txt").read_text().count("\n") == 50


@pytest.mark.parametrize("command", ["data", "train"])
def test_ctrl_c_ends_with_one_line_and_130(command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    large = {
        "data": ("data", "generate", str(out), "--rows", "100000000"),
        "train": ("train", "--out", str(out), "--generated-rows", "100000000"),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "shardemb.cli", *large[command]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(out / ("train.txt.partial" if command == "data" else "data/train.txt.partial"))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert said == "error: interrupted\n"
    assert process.returncode == 130


def test_the_default_batch_leaves_small_data_a_hundred_steps() -> None:
    assert [default_batch_size(n) for n in (10, 3000, 7200, 96_000, 10**9)] == [
        30,
        30,
        60,
        960,
        960,
    ]


@pytest.mark.skipif(not REAL.is_dir(), reason="the sample of Criteo's log is not here")
@pytest.mark.distributed
@pytest.mark.slow
def test_the_real_sample_reaches_its_auc(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shardemb.cli", "train", "--data", str(REAL)]
    done = shell(*command, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert 0.69 <= result(tmp_path / "run")["auc"] <= 0.76
    assert result(tmp_path / "run")["num_samples"] == 800
    assert result(tmp_path / "run")["malformed_lines"] == 0


@pytest.mark.distributed
@pytest.mark.slow
def test_the_generated_log_is_learnt_to_nine_tenths(tmp_path: Path) -> None:
    done = shell(sys.executable, "-m", "shardemb.cli", "train", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    reached = result(tmp_path / "run")
    assert 0.75 < reached["best_auc"] < 0.85
    assert reached["auc"] - 0.5 >= 0.9 * (reached["best_auc"] - 0.5)
