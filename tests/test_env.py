"""Who a rank is, and how one rank's error reaches the others."""

from typing import Any

import pytest
import torch

from shardemb.agree import all_or_none, by_main
from shardemb.cores import threads_per_rank, usable_cores
from shardemb.env import Env, init_distributed
from shardemb.errors import OtherRankError, RunError
from tests.spmd import spmd

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"RANK": None}, "has LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE but not RANK; start with"),
        ({"WORLD_SIZE": "two"}, "variable WORLD_SIZE must be an integer, got 'two'"),
        ({"WORLD_SIZE": "3"}, "WORLD_SIZE=3 is not a multiple of LOCAL_WORLD_SIZE=2; give every"),
    ],
)
def test_variables_that_no_launcher_sets_are_refused(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], text: str
) -> None:
    for name, value in (LAUNCHED | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=text):
        init_distributed()


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or None, got 'tpu'"):
        init_distributed(device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="needs CUDA device 0, this node has 0; start fewer"):
            init_distributed(device="cuda")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"world_size": "2"}, "world_size must be a whole number, got '2'"),
        ({"world_size": 2.0}, r"world_size must be a whole number, got 2\.0"),
        ({"num_nodes": None}, "num_nodes must be a whole number, got None"),
        ({"rank": True}, "rank must be a whole number, got True"),
        ({"device": "cpu"}, r"device must be a torch\.device, such as .*, got 'cpu'"),
    ],
)
def test_an_env_of_other_kinds_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Env(**fields)


@spmd(world_size=2)
def test_a_group_that_is_there_is_kept_and_must_be_the_launcher_s(env: Env) -> None:
    assert init_distributed(device="cpu") == env
    assert (env.world_size, env.local_world_size, env.num_nodes) == (2, 2, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(1 - env.rank))
        with pytest.raises(RunError, match="a process group is there already, of rank"):
            init_distributed(device="cpu")


@spmd(world_size=2)
def test_ranks_share_the_cores_unless_the_user_chose(env: Env) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.delenv(name, raising=False)
        torch.set_num_threads(usable_cores())  # as torch starts
        init_distributed(device="cpu")
        assert torch.get_num_threads() == threads_per_rank(env.local_world_size)
        assert torch.get_num_threads() * 2 <= max(2, usable_cores())
        torch.set_num_threads(usable_cores() + 5)
        init_distributed(device="cpu")
        assert torch.get_num_threads() == usable_cores() + 5
        patch.setenv("OMP_NUM_THREADS", str(usable_cores()))
        torch.set_num_threads(usable_cores())
        init_distributed(device="cpu")
        assert torch.get_num_threads() == usable_cores()


@spmd(world_size=3)
def test_an_error_on_any_rank_is_an_error_on_all(env: Env) -> None:
    def work(failing: set[int], error: type[BaseException] = KeyError) -> None:
        with all_or_none(env, "working"):
            if env.rank in failing:
                raise error(f"of rank {env.rank}")

    work(set())
    for failing in ({1}, {1, 2}, {0, 1, 2}):
        mine = env.rank in failing
        with pytest.raises(KeyError if mine else OtherRankError) as caught:
            work(failing)
        first = env.rank if mine else min(failing)
        assert f"of rank {first}" in str(caught.value)
        if not mine:
            assert str(caught.value).startswith("rank 1 failed while working: KeyError: ")
    with pytest.raises(SystemExit if env.rank == 2 else OtherRankError):
        work({2}, SystemExit)


@spmd(world_size=2)
def test_rank_0_s_value_reaches_all_and_so_do_its_errors(env: Env) -> None:
    assert by_main(env, "reading", lambda: {"rank": env.rank}) == {"rank": 0}

    def fail() -> Any:
        raise OSError("no such disk")

    with pytest.raises(OSError if env.is_main else OtherRankError, match="no such disk"):
        by_main(env, "reading", fail)
    with pytest.raises((AttributeError, TypeError) if env.is_main else OtherRankError):
        by_main(env, "making a function", lambda: lambda: None)
    assert by_main(env, "reading", lambda: 7) == 7
