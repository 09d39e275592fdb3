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
def test_the_script_gives_the_same_on_one_rank_and_two_and_goes_on(tmp_path: Path) -> None:
    (script,) = blocks("python")
    losses = {}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        (folder / "script.py").write_text(script)
        command = [sys.executable, "script.py"]
        if world_size > 1:
            module = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "script.py"]
            command = [sys.executable, *module]
        said = run(command, folder)
        assert "row_wise" in said
        losses[world_size] = {
            int(step): float(loss) for step, loss in re.findall(r"step (\d+), loss ([\d.]+)", said)
        }
    assert list(losses[1]) == [50, 100, 150, 200]
    assert losses[1][200] < 0.7 * losses[1][50]
    assert losses[2] == pytest.approx(losses[1], abs=2e-5)
    (tmp_path / "1/script.py").write_text(script.replace("num_steps=200", "num_steps=250"))
    again = run([sys.executable, "script.py"], tmp_path / "1")
    assert re.findall(r"step (\d+)", again) == ["250"]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_every_make_target_and_file_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert targets == {"train", "test"}
    for target in targets | set(re.findall(r"`make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for page in (ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
            assert (page.parent / link).exists(), link


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
