"""The README's blocks run, and say what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_script_runs_as_it_stands(tmp_path: Path, world_size: int) -> None:
    (script,) = blocks("python")
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "script.py"]
    if world_size > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "script.py",
        ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "row_wise" in done.stdout
    losses = [float(loss) for loss in re.findall(r"^\d+ ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert (tmp_path / "checkpoints" / "0000020" / "shardemb.json").is_file()


def test_every_make_target_and_file_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert targets == {"train", "test"}
    for target in targets | set(re.findall(r"`make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_torchx_lines_are_jobs() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if "torchx run" in line]
    assert len(lines) == 2
    for line in lines:
        words = line.replace("torchx run", "run --dryrun").replace(
            "shardemb.train", "launch/components.py:train"
        )
        done = subprocess.run(
            [sys.executable, "-m", "torchx.cli.main", *words.split()],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "shardemb.recipes.dlrm" in done.stdout
