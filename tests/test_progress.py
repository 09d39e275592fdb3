"""What a run's log says of its ids."""

import json
from pathlib import Path

import pytest

import shardemb as se
from shardemb.data.id_counts import IdCount
from shardemb.env import Env
from shardemb.recipes.progress import Progress
from shardemb.recipes.run_folder import RunFolder
from tests.spmd import spmd


def batcher() -> se.Batcher:
    policies = {"clicked": "drop", "item": "clamp", "user": "hash", "page": "oov_row", "x": "raise"}
    return se.Batcher(
        [
            se.TableConfig(
                name=feature,
                num_embeddings=10,
                embedding_dim=4,
                feature_names=(feature,),
                out_of_range=policy,  # type: ignore[arg-type]
            )
            for feature, policy in policies.items()
        ]
    )


def features(**changed: list[list[int]]) -> dict[str, list[list[int]]]:
    return (
        {name: [[1], [2]] for name in ("clicked", "item", "page", "x")}
        | {"user": [[], []]}
        | changed
    )


@spmd(world_size=2)
def test_the_log_sums_what_became_of_ids_over_ranks_at_its_own_steps(
    env: Env, tmp_path: Path
) -> None:
    make = batcher()
    called = []

    def id_counts() -> dict[str, IdCount]:
        called.append(step)
        return make.counts.of_all_ranks(env)

    folder = RunFolder(tmp_path) if env.is_main else None
    progress = Progress(folder, num_steps=7, batch_size=4, log_every=3, id_counts=id_counts)
    for step in range(1, 8):
        bad = [[99]] * (env.rank + 1) + [[1]] * (1 - env.rank)
        make(features(**({"clicked": bad, "page": bad, "user": bad} if step >= 3 else {})))
        progress.step(step, 0.5)
    assert called == [1, 3, 6, 7]
    if env.is_main:
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        entries = {entry["step"]: entry for entry in map(json.loads, lines)}
        assert list(entries) == called
        assert "ids" not in entries[1]
        assert entries[3]["ids"] == {
            "clicked": {"num_ids": 12, "dropped": 3},
            "user": {"num_ids": 4, "hashed": 4},
            "page": {"num_ids": 12, "oov": 3},
        }
        assert entries[7]["ids"] == {
            "clicked": {"num_ids": 28, "dropped": 15},
            "user": {"num_ids": 20, "hashed": 20},
            "page": {"num_ids": 28, "oov": 15},
        }


def test_the_line_says_how_many_ids_were_changed_and_nothing_where_none_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = batcher()
    progress = Progress(
        RunFolder(tmp_path),
        num_steps=3,
        batch_size=2,
        log_every=1,
        id_counts=lambda: make.counts.of_all_ranks(Env()),
    )
    make(features())
    progress.step(1, 0.5)
    make(features(clicked=[[99, 98], [1]], item=[[-1], [2]]))
    progress.step(2, 0.5)
    make.counts.reset()
    make(features())
    progress.step(3, 0.5)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "step 1/3  loss 0.5000"
    assert second.endswith("  ids: 2 of 17 dropped, 1 of 17 clamped")
    assert "ids" not in third
    Progress(None, num_steps=1, batch_size=2, log_every=1).step(1, 0.5)
    assert capsys.readouterr().out == ""
